"""All that is kept of requests for others, behind one door for the scheduler."""

from collections.abc import Callable, Sequence

from vllm.v1.request import Request

from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.core.continuation import Continuation
from vllm_kvcompress.core.host_groups import HostGroup
from vllm_kvcompress.core.kept_store import KeptCaches
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.reports import Reports
from vllm_kvcompress.core.room import Room
from vllm_kvcompress.core.sessions import Sessions
from vllm_kvcompress.core.shared_prefixes import SharedPrefixes
from vllm_kvcompress.metrics import CompressionStats


class Reuse:
    """Compressed caches of chats and of shared prefixes.

    Parameters
    ----------
    planner : Planner
        States of all requests.
    managers : sequence of (CompressedAttentionManager or HostGroup)
        One per KV cache group.
    layer_group_of : sequence of (int or None)
        Layer group of every KV cache group; None for one that is never compacted.
    room : Room
        The pool, which asks what is kept to give way.
    reports : Reports
        Of the workers: until they have reported on a request's compactions, nothing of it is kept.
    stats : CompressionStats
        Where to count.

    Attributes
    ----------
    kept : KeptCaches
        What is kept.
    sessions : Sessions
        Of chats, for their next turn.
    prefixes : SharedPrefixes
        Of beginnings that many prompts share.
    """

    def __init__(
        self,
        planner: Planner,
        managers: Sequence[CompressedAttentionManager | HostGroup],
        layer_group_of: Sequence[int | None],
        room: Room,
        reports: Reports,
        stats: CompressionStats,
    ) -> None:
        own = [each for each in managers if isinstance(each, CompressedAttentionManager)]
        groups = [number for number in layer_group_of if number is not None]
        max_blocks = int(planner.config.sessions.max_blocks_ratio * room.num_usable)
        if len(own) < len(managers) or len(groups) < len(managers):
            # Blocks of windowed and recurrent layers, and of a draft model, follow other rules.
            own, groups, max_blocks = [], [], 0
        self.kept = room.kept = KeptCaches(room.pool, max_blocks, stats, room.note_change)
        self._reports = reports
        self.sessions = Sessions(planner, own, groups, self.kept, stats)
        self.prefixes = SharedPrefixes(planner, own, groups, self.kept, stats)

    def find(self, request: Request, num_cached: int) -> Continuation | None:
        """What a request that starts begins with; `num_cached` tokens are in the prefix cache."""
        found = self.prefixes.find(request)
        return self.sessions.find(request, num_cached) if found is None else found

    def note_started(self, request: Request) -> None:
        """Count what became of what a request asked for, once it starts."""
        self.sessions.note_started(request)
        self.prefixes.note_started(request)

    def publish(self) -> None:
        """Let others have what has been compressed for all."""
        self.prefixes.publish(self._reports.is_complete)

    def give_up(self, request_id: str) -> None:
        """A request's cache is not to be read: others get nothing of it, and it of nobody."""
        self.prefixes.give_up(request_id)

    def end(self, request: Request, settle: Callable[[str, int], bool]) -> None:
        """Keep what others may begin with of a request that ends, and has its blocks yet.

        Parameters
        ----------
        request : Request
            Of what is kept for a next turn, it loses the blocks.
        settle : callable
            Commits what the last step compacted of a request, if only its first so many tokens
            were; else returns False.
        """
        self.prefixes.end(request, settle, self._reports.is_complete)
        if self._reports.is_complete(request.request_id):
            self.sessions.keep(request, settle)

    def check_integrity(self) -> None:
        """Raise AssertionError if the books contradict each other."""
        self.kept.check_integrity()
        self.sessions.check_integrity()
        self.prefixes.check_integrity()

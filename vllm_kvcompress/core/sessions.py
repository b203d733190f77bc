"""Compressed caches that wait for the next turn of their conversation.

A request that names a conversation (``kv_session``) leaves its cache here when it ends, if it was
compressed: the blocks are kept, not freed. The next request of that name, under the same setting,
whose prompt begins with the same tokens continues from there: it takes the blocks over and computes
the rest of its prompt alone. The blocks are its own from then on, as its predecessor's were.

What was evicted stays evicted, so this is lossy reuse, and nobody gets it who does not ask for it.
The name says whose cache it is, because there is one to be had and one who takes it; the tokens are
compared besides, one by one, so a wrong name costs a prefill and never a wrong token.

Kept blocks are memory for speed alone. The longest unused go first where there are too many, and
all of them go before a request waits or is preempted, or a compaction overwrites its own blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.core.host_groups import HostGroup
from vllm_kvcompress.core.kept_cache import (
    Kept,
    Outcome,
    Place,
    Reason,
    is_private,
    is_served,
    num_common,
    place_of,
)
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.tracked_request import Phase, TrackedRequest
from vllm_kvcompress.core.turns import num_reusable, pins_alike
from vllm_kvcompress.metrics import CompressionStats

Managers = Sequence[CompressedAttentionManager | HostGroup]

_ENDED = (
    RequestStatus.FINISHED_STOPPED,
    RequestStatus.FINISHED_LENGTH_CAPPED,
    RequestStatus.FINISHED_REPETITION,
)
"""How a request ends whose conversation may go on; not by an abort or an error."""


class Continuation(KVCacheBlocks):
    """A prefix-cache hit, for vLLM's scheduler, whose blocks are one conversation's kept ones.

    To vLLM it has no blocks: they become the request's while it asks for more (`begin`), and stay
    its own if it gets them (`end`).

    Attributes
    ----------
    num_tokens : int
        Tokens that are in them.
    """

    def __init__(
        self, sessions: "Sessions", request_id: str, place: Place, kept: Kept, num_tokens: int
    ) -> None:
        super().__init__(tuple(() for _ in kept.blocks))
        self.num_tokens = num_tokens
        self._sessions, self._request_id, self._place = sessions, request_id, place
        self._kept = kept
        self._before: TrackedRequest | None = None

    def begin(self) -> None:
        """The blocks are the request's."""
        self._before = self._sessions.hand_over(
            self._request_id, self._place, self._kept, self.num_tokens
        )

    def end(self, admitted: bool) -> None:
        """They stay, or wait again."""
        assert self._before is not None
        if admitted:
            self._sessions.free_behind(self._kept, self.num_tokens)
        else:
            self._sessions.take_back(self._before, self._request_id, self._place, self._kept)


class Sessions:
    """Caches of conversations that nobody continues yet.

    Parameters
    ----------
    planner : Planner
        States of all requests.
    managers : sequence of (CompressedAttentionManager or HostGroup)
        One per KV cache group.
    layer_group_of : sequence of (int or None)
        Layer group of every KV cache group; None for one that is never compacted.
    pool : BlockPool
        vLLM's.
    stats : CompressionStats
        Where to count.
    note_change : callable
        Called when blocks have lost an owner.
    """

    def __init__(
        self,
        planner: Planner,
        managers: Managers,
        layer_group_of: Sequence[int | None],
        pool: Any,
        stats: CompressionStats,
        note_change: Callable[[], None],
    ) -> None:
        self.planner, self.pool, self.stats = planner, pool, stats
        self._note_change = note_change
        own = [each for each in managers if isinstance(each, CompressedAttentionManager)]
        # Blocks of windowed and recurrent layers, and of a draft model, follow other rules.
        is_alone = len(own) == len(managers) and None not in layer_group_of
        self._managers = own if is_alone else []
        self._groups = [number for number in layer_group_of if number is not None]
        usable = pool.num_gpu_blocks - 1
        self._max_blocks = int(planner.config.sessions.max_blocks_ratio * usable) if is_alone else 0
        self._kept: dict[Place, Kept] = {}  # the longest unused comes first

    # --- the end of a turn ----------------------------------------------------------------

    def keep(self, request: Request, settle: Callable[[str, int], bool]) -> None:
        """Keep the blocks of a request that ends, if its conversation may go on from there.

        Parameters
        ----------
        request : Request
            It has its blocks yet; what is kept of them, it loses.
        settle : callable
            Commits what the last step compacted of a request, if only its first so many tokens
            were; else returns False.
        """
        name = request.request_id
        tracked = self.planner.requests.get(name)
        if tracked is None or tracked.session is None or not self._may_be_kept(request, tracked):
            return
        # The last token has been sampled, and nothing has been computed of it for certain.
        num_tokens = request.num_tokens - 1
        if not settle(name, num_tokens) or not tracked.compaction.compacted_at:
            return
        assert tracked.config is not None
        if tracked.compaction.compacted_at > num_tokens:
            return
        blocks = [manager.pop_blocks_for_free(name) for manager in self._managers]
        kept = Kept(
            token_ids=list(request.all_token_ids[:num_tokens]),
            blocks=blocks,
            held=tracked.compaction,
            prompt_len=tracked.prompt_len,
            config=tracked.config,
        )
        kept = self._without_rest(kept, num_tokens)
        place = place_of(request, tracked.session)
        self.give_back(place, Reason.REPLACED)
        self.stats.sessions_kept += 1
        if kept.num_blocks > self._max_blocks:
            self._free(kept.blocks)
            self.stats.record_session_given_back(Reason.TOO_LARGE)
            return
        while self._num_blocks() + kept.num_blocks > self._max_blocks:
            self._give_back_oldest(Reason.LIMIT)
        self._kept[place] = kept

    def _may_be_kept(self, request: Request, tracked: TrackedRequest) -> bool:
        return (
            self._max_blocks > 0
            and request.status in _ENDED
            and tracked.phase is not Phase.SKIPPED
            and is_served(request)
        )

    # --- the next turn --------------------------------------------------------------------

    def find(self, request: Request, num_cached: int) -> Continuation | None:
        """What a request that starts may continue; None: nothing, or less than it finds anyway.

        `num_cached` tokens of it are in vLLM's prefix cache, which loses nothing. The two are never
        mixed: what is computed behind an exact prefix has seen other keys.
        """
        name = request.request_id
        tracked = self.planner.requests.get(name)
        if tracked is None or tracked.session is None or request.num_preemptions:
            return None
        place = place_of(request, tracked.session)
        found = self._match(request, tracked, self._kept.get(place))
        if isinstance(found, str):
            tracked.session_outcome = found
            return None
        kept, num_tokens = found
        if num_tokens <= num_cached:
            tracked.session_outcome = Outcome.PREFIX_CACHE
            return None
        tracked.session_outcome = Outcome.REUSED
        return Continuation(self, name, place, kept, num_tokens)

    def _match(
        self, request: Request, tracked: TrackedRequest, kept: Kept | None
    ) -> tuple[Kept, int] | str:
        """What is kept for a request and how many tokens of it are of use, or why nothing is."""
        if tracked.config is None or tracked.phase is Phase.SKIPPED:
            return Outcome.UNCOMPRESSED
        if not is_served(request) or request.skip_reading_prefix_cache:
            return Outcome.UNSERVED
        if kept is None:
            return Outcome.NOTHING_KEPT
        if kept.config != tracked.config:
            return Outcome.OTHER_SETTING
        assert request.prompt_token_ids is not None
        common = num_common(kept.token_ids, request.prompt_token_ids)
        compacted_at = kept.held.compacted_at
        num_tokens = num_reusable(tracked, common, compacted_at)
        if num_tokens is None:
            return Outcome.OTHER_TOKENS
        if not pins_alike(tracked, num_tokens, kept.prompt_len):
            return Outcome.OTHER_SETTING
        if any(not is_private(block) for block in self._written_next(kept, num_tokens)):
            # Hashed before a late compaction: it may be read, not written.
            num_tokens -= num_tokens % self._managers[0].block_size
            if num_tokens < compacted_at:
                return Outcome.SHARED_BLOCK
        return kept, num_tokens

    def note_started(self, request: Request) -> None:
        """Count what became of a request that names a conversation, once it starts."""
        tracked = self.planner.requests.get(request.request_id)
        if tracked is not None and tracked.session_outcome is not None:
            self.stats.record_session(tracked.session_outcome, tracked.num_reused)
            tracked.session_outcome = None  # once: it may be preempted and start again

    # --- whose blocks they are ------------------------------------------------------------

    def hand_over(
        self, request_id: str, place: Place, kept: Kept, num_tokens: int
    ) -> TrackedRequest:
        """What is kept is the request's, with those of its blocks that it needs.

        Returns the request's state before that.
        """
        del self._kept[place]
        for manager, blocks, evicted, count in self._parts(kept, num_tokens):
            manager.take_over(request_id, blocks[:count], evicted)
        return self.planner.continue_from(request_id, kept.held, num_tokens)

    def take_back(self, before: TrackedRequest, request_id: str, place: Place, kept: Kept) -> None:
        """There was no room for the request: everything is as before `hand_over`."""
        for manager in self._managers:
            manager.pop_blocks_for_free(request_id)
        self.planner.requests[request_id] = before
        self._kept[place] = kept
        used = self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()
        if used == len({block.block_id for block in self.held_blocks()}):
            # Nobody runs who could make room. From nothing it needs no more than when it came.
            self.give_back(place, Reason.NO_FIT)

    def free_behind(self, kept: Kept, num_tokens: int) -> None:
        """Free the blocks that the request has not taken."""
        self._without_rest(kept, num_tokens)

    def _without_rest(self, kept: Kept, num_tokens: int) -> Kept:
        parts = list(self._parts(kept, num_tokens))
        self._free([blocks[count:] for _, blocks, _, count in parts])
        return replace(kept, blocks=[blocks[:count] for _, blocks, _, count in parts])

    def _parts(
        self, kept: Kept, num_tokens: int
    ) -> Iterator[tuple[CompressedAttentionManager, list[KVCacheBlock], int, int]]:
        """By KV cache group: manager, blocks, evicted slots, blocks that `num_tokens` need."""
        evicted = kept.held.evicted
        for manager, number, blocks in zip(self._managers, self._groups, kept.blocks, strict=True):
            lost = evicted[number]
            yield manager, blocks, lost, -(-(num_tokens - lost) // manager.block_size)

    def _written_next(self, kept: Kept, num_tokens: int) -> Iterator[KVCacheBlock]:
        """Blocks that hold the last of so many tokens, and have room for the next one."""
        for manager, blocks, evicted, count in self._parts(kept, num_tokens):
            if (num_tokens - evicted) % manager.block_size:
                yield blocks[count - 1]

    # --- what gives way -------------------------------------------------------------------

    @property
    def num_private(self) -> int:
        """Blocks that come free if everything is given back."""
        return sum(block.ref_cnt == 1 for block in self.held_blocks())

    def give_way(self) -> bool:
        """Give back what was used longest ago; False if nothing is kept."""
        return self._give_back_oldest(Reason.ROOM)

    def give_back_sharers(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Give back whatever holds one of these, for whose owner they do not come free."""
        wanted = {block.block_id for block in blocks if block.ref_cnt > 1}
        for place, kept in list(self._kept.items()):
            if any(block.block_id in wanted for group in kept.blocks for block in group):
                self.give_back(place, Reason.ROOM)

    def clear(self) -> None:
        """Give everything back: the prefix cache is emptied."""
        while self._give_back_oldest(Reason.RESET):
            pass

    def _give_back_oldest(self, reason: str) -> bool:
        for place in self._kept:
            self.give_back(place, reason)
            return True
        return False

    def give_back(self, place: Place, reason: str) -> None:
        """Free a conversation's blocks, if it has any."""
        kept = self._kept.pop(place, None)
        if kept is not None:
            self._free(kept.blocks)
            self.stats.record_session_given_back(reason)

    def _free(self, groups: Sequence[Sequence[KVCacheBlock]]) -> None:
        for blocks in groups:
            self.pool.free_blocks(reversed(blocks))
        self._note_change()

    def _num_blocks(self) -> int:
        return sum(kept.num_blocks for kept in self._kept.values())

    def held_blocks(self) -> list[KVCacheBlock]:
        """Every block that is kept."""
        return [block for kept in self._kept.values() for group in kept.blocks for block in group]

    # --- tests ----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError if the books contradict each other."""
        assert self._num_blocks() <= self._max_blocks
        for block in self.held_blocks():
            assert block.ref_cnt > 0, f"block {block.block_id} is kept and free"
        for place, kept in self._kept.items():
            num_tokens = len(kept.token_ids)
            assert 0 < kept.held.compacted_at <= num_tokens, place
            for _, blocks, _, count in self._parts(kept, num_tokens):
                assert len(blocks) == count, place

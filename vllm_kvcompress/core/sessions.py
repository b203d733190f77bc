"""Compressed caches that wait for the next turn of their conversation.

A request that names a conversation (``kv_session``) leaves its cache here when it ends, if it was
compressed: the blocks are kept, not freed. The next request of that name, under the same setting,
whose prompt begins with the same tokens continues from there: it takes the blocks over and computes
the rest of its prompt alone. The blocks are its own from then on, as its predecessor's were.

What was evicted stays evicted, so this is lossy reuse, and nobody gets it who does not ask for it.
The name says whose cache it is, because there is one to be had and one who takes it; the tokens are
compared besides, one by one, so a wrong name costs a prefill and never a wrong token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.core.continuation import Continuation
from vllm_kvcompress.core.kept_cache import (
    Kept,
    Kind,
    Outcome,
    Place,
    Reason,
    is_private,
    is_served,
    num_common,
    place_of,
    tokens_of,
)
from vllm_kvcompress.core.kept_store import KeptCaches
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.tracked_request import Phase, TrackedRequest
from vllm_kvcompress.core.turns import continue_from, num_reusable, pins_alike
from vllm_kvcompress.metrics import CompressionStats

_ENDED = (
    RequestStatus.FINISHED_STOPPED,
    RequestStatus.FINISHED_LENGTH_CAPPED,
    RequestStatus.FINISHED_REPETITION,
)
"""How a request ends whose conversation may go on; not by an abort or an error."""


class Sessions:
    """Caches of conversations that nobody continues yet.

    Parameters
    ----------
    planner : Planner
        States of all requests.
    managers : sequence of CompressedAttentionManager
        One per KV cache group; none where caches cannot be kept.
    layer_groups : sequence of int
        Layer group of every KV cache group.
    store : KeptCaches
        Where caches wait.
    stats : CompressionStats
        Where to count.
    """

    def __init__(
        self,
        planner: Planner,
        managers: Sequence[CompressedAttentionManager],
        layer_groups: Sequence[int],
        store: KeptCaches,
        stats: CompressionStats,
    ) -> None:
        self.planner, self.store, self.stats = planner, store, stats
        self._managers, self._groups = managers, layer_groups

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
            token_ids=tokens_of(request.all_token_ids[:num_tokens]),
            blocks=blocks,
            held=tracked.compaction,
            prompt_len=tracked.prompt_len,
            config=tracked.config,
        )
        kept = self._without_rest(kept, num_tokens)
        self.stats.sessions_kept += 1
        self.store.put(place_of(request, tracked.session, Kind.SESSION), kept)

    def _may_be_kept(self, request: Request, tracked: TrackedRequest) -> bool:
        return (
            bool(self.store.max_blocks)
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
        place = place_of(request, tracked.session, Kind.SESSION)
        found = self._match(request, tracked, self.store.get(place))
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
        if any(not is_private(block) for block in self._last_blocks(kept, num_tokens)):
            # Hashed before a late compaction: they may be read, not written. As whole blocks are
            # evicted, those of all groups end at the same token; full ones stay.
            num_tokens -= num_tokens % self.planner.block_size
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
        self.store.take(place)
        for manager, blocks, evicted, count in self._parts(kept, num_tokens):
            manager.take_over(request_id, blocks[:count], evicted)
        before = self.planner.set_aside(request_id)
        sizes = self.planner.block_size, self.planner.codes_per_row
        continue_from(self.planner.requests[request_id], kept.held, num_tokens, *sizes)
        return before

    def take_back(self, before: TrackedRequest, request_id: str, place: Place, kept: Kept) -> None:
        """There was no room for the request: everything is as before `hand_over`."""
        for manager in self._managers:
            manager.pop_blocks_for_free(request_id)
        self.planner.requests[request_id] = before
        self.store.put_back(place, kept)
        if self.store.is_all:
            # Nobody runs who could make room. From nothing it needs no more than when it came.
            self.store.give_back(place, Reason.NO_FIT)

    def confirm(self, kept: Kept, num_tokens: int) -> None:
        """Free the blocks that the request has not taken."""
        self._without_rest(kept, num_tokens)

    def _without_rest(self, kept: Kept, num_tokens: int) -> Kept:
        parts = list(self._parts(kept, num_tokens))
        self.store.free([blocks[count:] for _, blocks, _, count in parts])
        return replace(kept, blocks=[blocks[:count] for _, blocks, _, count in parts])

    def _parts(
        self, kept: Kept, num_tokens: int
    ) -> Iterator[tuple[CompressedAttentionManager, list[KVCacheBlock], int, int]]:
        """By KV cache group: manager, blocks, evicted slots, blocks that `num_tokens` need."""
        evicted = kept.held.evicted
        for manager, number, blocks in zip(self._managers, self._groups, kept.blocks, strict=True):
            lost = evicted[number]
            yield manager, blocks, lost, -(-(num_tokens - lost) // manager.block_size)

    def _last_blocks(self, kept: Kept, num_tokens: int) -> list[KVCacheBlock]:
        """Those that hold the last of so many tokens, by KV cache group."""
        return [blocks[count - 1] for _, blocks, _, count in self._parts(kept, num_tokens)]

    # --- tests ----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError if the books contradict each other."""
        for place, kept in self.store.of(Kind.SESSION):
            num_tokens = len(kept.token_ids)
            for _, blocks, _, count in self._parts(kept, num_tokens):
                assert len(blocks) == count, place

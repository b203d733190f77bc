"""Beginnings that many prompts share: compressed once, without a question, and read by all.

A request says how many tokens its prompt has in common with others (``kv_shared_prefix``), whole
blocks of which are compressed as a prompt of their own; what follows stays whole. The blocks of the
survivors are never written again, so every request that begins with the same tokens, under the same
setting, reads them while it is served, and so does whoever comes later, until they give way.

One request at a time computes a prefix; the others of its kind wait for that, and for nothing else:
computing it once more would cost them as much. So all of them read the very same survivors, and
what any of them says does not depend on who else is served. If the one that computes ends, or is
preempted, before it gets as far, another takes over.

What is compressed depends on the prefix alone, so a hash of its tokens and setting is its name, and
nobody needs to invent one. It is lossy, so nobody gets it who does not ask for it.
"""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.core.continuation import Continuation
from vllm_kvcompress.core.kept_cache import Kept, Kind, Place, is_served, place_of, tokens_of
from vllm_kvcompress.core.kept_store import KeptCaches
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.tracked_request import Phase, TrackedRequest
from vllm_kvcompress.core.turns import begin_with
from vllm_kvcompress.metrics import CompressionStats


class PrefixOutcome:
    """What became of a request that names a shared prefix; values of the metric's label."""

    COMPUTED = "computed"
    REUSED = "reused"
    UNCOMPRESSED = "uncompressed"
    UNSERVED = "unserved"


@dataclass
class _Wish:
    """A request, and what it begins with."""

    request: Request
    place: Place
    is_counted: bool = False


class SharedPrefixes:
    """Who computes which prefix, and who begins with it.

    Parameters
    ----------
    planner : Planner
        States of all requests.
    managers : sequence of CompressedAttentionManager
        One per KV cache group; none where caches cannot be kept.
    layer_groups : sequence of int
        Layer group of every KV cache group.
    store : KeptCaches
        Where prefixes are kept.
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
        self._wanted: dict[str, _Wish] = {}
        self._computing: dict[Place, str] = {}

    def add(self, request: Request) -> None:
        """Note what a request that arrives has in common with others."""
        tracked = self.planner.requests[request.request_id]
        if tracked.shared_len is None:
            return
        if tracked.config is None or tracked.phase is Phase.SKIPPED:
            self.stats.record_shared_prefix(PrefixOutcome.UNCOMPRESSED, 0)
        elif not self._managers or not is_served(request) or request.skip_reading_prefix_cache:
            self.stats.record_shared_prefix(PrefixOutcome.UNSERVED, 0)
        else:
            self._wanted[request.request_id] = _Wish(request, self._place(request, tracked))

    def _place(self, request: Request, tracked: TrackedRequest) -> Place:
        assert request.prompt_token_ids is not None and tracked.config is not None
        said = array("q", request.prompt_token_ids[: tracked.shared_len])
        name = hashlib.sha256(said.tobytes())
        name.update(tracked.config.model_dump_json().encode())
        return place_of(request, name.hexdigest(), Kind.SHARED_PREFIX)

    # --- who computes, who waits, who begins ----------------------------------------------

    def must_wait(self, request: Request) -> bool:
        """Whether somebody computes what a request is about to begin with.

        Else it is the one that will, unless that is kept.
        """
        name = request.request_id
        if name not in self._wanted:
            return False
        place, tracked = self._wanted[name].place, self.planner.requests[name]
        if self.store.get(place) is not None:
            return False
        other = self._computing.get(place, name)
        if other != name and self._is_computing(other):
            # A prompt that ends with the prefix could not begin with all of it.
            return tracked.prompt_len < request.num_tokens
        self._computing[place] = name
        return False

    def _is_computing(self, request_id: str) -> bool:
        found = self._wanted.get(request_id)
        return found is not None and found.request.status == RequestStatus.RUNNING

    def find(self, request: Request) -> Continuation | None:
        """What a request that starts begins with; None if it computes that."""
        name = request.request_id
        if name not in self._wanted:
            return None
        place = self._wanted[name].place
        kept = self.store.get(place)
        # One token at least must be computed.
        if kept is None or kept.prompt_len >= request.num_tokens:
            return None
        return Continuation(self, name, place, kept, kept.prompt_len)

    def note_started(self, request: Request) -> None:
        """Count what became of a request that names a prefix, once it starts."""
        wish = self._wanted.get(request.request_id)
        if wish is not None and not wish.is_counted:  # it may be preempted, and start again
            tracked, wish.is_counted = self.planner.requests[request.request_id], True
            outcome = PrefixOutcome.COMPUTED if tracked.start is None else PrefixOutcome.REUSED
            self.stats.record_shared_prefix(outcome, tracked.num_reused)

    # --- whose blocks they are ------------------------------------------------------------

    def publish(self, is_reported: Callable[[str], bool]) -> None:
        """Keep what has been compressed since the last step, for others.

        `is_reported` says whether the workers have reported on a request's last compaction: what
        went wrong there must not reach others.
        """
        for place, name in list(self._computing.items()):
            tracked = self.planner.requests[name]
            assert tracked.shared_len is not None and tracked.config is not None
            if tracked.phase is not Phase.DONE or tracked.start is not None:
                continue
            if not is_reported(name):
                continue
            del self._computing[place]
            if tracked.compaction.compacted_at != tracked.shared_len:
                continue
            request, lost = self._wanted[name].request, tracked.compaction.evicted
            blocks = [
                manager.req_to_blocks[name][
                    : (tracked.shared_len - lost[number]) // manager.block_size
                ]
                for manager, number in zip(self._managers, self._groups, strict=True)
            ]
            for each in blocks:
                self.store.pool.touch(each)
            assert request.prompt_token_ids is not None
            kept = Kept(
                token_ids=tokens_of(request.prompt_token_ids[: tracked.shared_len]),
                blocks=blocks,
                held=replace(tracked.compaction),
                prompt_len=tracked.shared_len,
                config=tracked.config,
            )
            self.stats.shared_prefixes_kept += 1
            self.store.put(place, kept)

    def end(
        self,
        request: Request,
        settle: Callable[[str, int], bool],
        is_reported: Callable[[str], bool],
    ) -> None:
        """A request ends, and has its blocks yet.

        `settle` commits what the last step compacted of it; `is_reported` as for `publish`.
        """
        name = request.request_id
        if name not in self._wanted:
            return
        tracked, place = self.planner.requests[name], self._wanted[name].place
        if self._computing.get(place) == name:
            if request.status is not RequestStatus.FINISHED_ERROR:
                settle(name, tracked.prompt_len)
                self.publish(is_reported)
            self._computing.pop(place, None)
        del self._wanted[name]

    def give_up(self, request_id: str) -> None:
        """A request goes on by itself: it begins with nothing of others, and computes for none."""
        wish = self._wanted.pop(request_id, None)
        if wish is not None and self._computing.get(wish.place) == request_id:
            del self._computing[wish.place]

    def hand_over(
        self, request_id: str, place: Place, kept: Kept, num_tokens: int
    ) -> TrackedRequest:
        """A request reads the blocks of a prefix; its state before that."""
        evicted = kept.held.evicted
        for manager, number, blocks in zip(self._managers, self._groups, kept.blocks, strict=True):
            self.store.pool.touch(blocks)
            manager.take_over(request_id, blocks, evicted[number])
        before = self.planner.set_aside(request_id)
        begin_with(self.planner.requests[request_id], kept.held, num_tokens)
        return before

    def confirm(self, kept: Kept, num_tokens: int) -> None:
        """It does so until it ends."""

    def take_back(self, before: TrackedRequest, request_id: str, place: Place, kept: Kept) -> None:
        """There was no room for the request: it holds nothing, as before."""
        for manager in self._managers:
            self.store.pool.free_blocks(reversed(manager.pop_blocks_for_free(request_id)))
        self.planner.requests[request_id] = before
        self.store.trim()

    # --- tests ----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError if the books contradict each other."""
        assert self._wanted.keys() <= self.planner.requests.keys()
        for place, name in self._computing.items():
            assert self._wanted[name].place == place
        for place, kept in self.store.of(Kind.SHARED_PREFIX):
            for manager, number, blocks in zip(
                self._managers, self._groups, kept.blocks, strict=True
            ):
                held = kept.prompt_len - kept.held.evicted[number]
                assert len(blocks) * manager.block_size == held, place

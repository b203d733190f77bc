"""Block manager of one layer group: swaps a request's blocks for fewer, private ones.

Life of a compaction, per request and group:

1. `plan` takes destination blocks from the pool. The request keeps all it has. Where the pool has
   too few, blocks of the region itself that only this request holds are destinations as well: the
   worker copies survivors aside before it writes them.
2. The worker copies survivors into them, after the forward pass of that step.
3. `commit`, at the start of the next step's scheduling, replaces the region's blocks by the
   destinations in the request's block list and returns the old ones to the pool. They may be
   handed out at once: the copy was queued on the device before any later step's writes.

No other source block is written, so blocks that are shared or hashed stay valid in the prefix
cache; those that are overwritten leave it first. Freeing, preempting or aborting a request between
1 and 3 returns both sets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_kvcompress.plans import GroupCache, GroupLengths, GroupPlan, Purpose, Span
from vllm_kvcompress.spec import CompressedAttentionSpec, CompressedMLASpec


@dataclass(frozen=True)
class _Pending:
    lengths: GroupLengths
    destination: list[KVCacheBlock]
    num_new: int
    is_adopted: bool = False

    @property
    def new(self) -> list[KVCacheBlock]:
        """Destination blocks that are not among the region's own."""
        return self.destination[: self.num_new]


class CompressedAttentionManager(FullAttentionManager):
    """Full-attention manager whose requests may hold fewer blocks than their length needs.

    Attributes
    ----------
    evicted : dict[str, int]
        Slots given up so far, by request id; absent means none. Always a multiple of the block
        size.
    lossy : set[str]
        Requests of which any group has lost tokens: what they compute from then on is not what an
        uncompressed request computes, in any layer above, so none of it is hashed.
    views : dict[str, list[KVCacheBlock]]
        Private blocks that drafts read in the place of a request's own, held until it ends.
    promised : dict[str, list[KVCacheBlock]]
        Survivors of an equal prompt that a request will read, and holds for that.
    most_held : callable
        Most slots that a request of so many tokens has ever needed. Whoever admits it counts these.
    """

    def __init__(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*args, **kwargs)
        self.evicted: dict[str, int] = {}
        self.lossy: set[str] = set()
        self._pending: dict[str, _Pending] = {}
        self._pending_views: dict[str, list[KVCacheBlock]] = {}
        self.views: dict[str, list[KVCacheBlock]] = {}
        self.promised: dict[str, list[KVCacheBlock]] = {}
        self.most_held: Callable[[str, int], int] = lambda request_id, num_tokens: num_tokens

    # --- compaction -----------------------------------------------------------------------

    def plan(
        self,
        purpose: Purpose,
        request_id: str,
        lengths: GroupLengths,
        cache: GroupCache,
        forced: tuple[Span, ...],
        num_own: int = 0,
    ) -> GroupPlan:
        """Take what destination blocks the purpose needs, and describe what the worker does.

        The caller has checked for room. Of an eviction's destinations, `num_own` are private blocks
        of the region.
        """
        blocks = self.req_to_blocks[request_id]
        num_source = lengths.region_len // self.block_size
        assert num_source <= len(blocks)
        if purpose is Purpose.EVICT:
            destination = self._take_for_eviction(request_id, lengths, num_own)
        elif purpose is Purpose.ADOPT:
            destination = self.promised.pop(request_id)
            assert request_id not in self._pending
            assert len(destination) * self.block_size == lengths.kept_len
            self._pending[request_id] = _Pending(lengths, destination, len(destination), True)
        elif purpose is Purpose.COPIED_VIEW:
            destination = self._take_for_view(request_id, lengths)
        else:
            destination = []  # a linked view is made of blocks that are there
        ids = [block.block_id for block in blocks]
        return GroupPlan(
            lengths=lengths,
            cache=cache,
            forced=forced,
            source_blocks=tuple(ids[:num_source]),
            destination_blocks=tuple(block.block_id for block in destination),
            tail_blocks=tuple(ids[num_source:]),
            in_place=num_own > 0,
        )

    def _take_for_eviction(
        self, request_id: str, lengths: GroupLengths, num_own: int
    ) -> list[KVCacheBlock]:
        assert request_id not in self._pending
        num_new = lengths.kept_len // self.block_size - num_own
        own = self.private_blocks(request_id, lengths)[-num_own:] if num_own else []
        assert len(own) == num_own
        destination = self.block_pool.get_new_blocks(num_new) + own
        if own:
            # Before anybody can find them again, and before they could be hashed once more.
            self.block_pool.evict_blocks({block.block_id for block in own})
            self.mark_lossy(request_id)
        self._pending[request_id] = _Pending(lengths, destination, num_new)
        return destination

    def private_blocks(self, request_id: str, lengths: GroupLengths) -> list[KVCacheBlock]:
        """Blocks of the region that no other request holds, in order."""
        num_source = lengths.region_len // self.block_size
        return [
            block for block in self.req_to_blocks[request_id][:num_source] if block.ref_cnt == 1
        ]

    def _take_for_view(self, request_id: str, lengths: GroupLengths) -> list[KVCacheBlock]:
        assert request_id not in self._pending_views
        view = self.block_pool.get_new_blocks(lengths.kept_len // self.block_size)
        self._pending_views[request_id] = view
        return view

    def commit(self, request_id: str) -> bool:
        """Swap the request's blocks and free the region. False if nothing was pending."""
        pending = self._pending.pop(request_id, None)
        if pending is None:
            return False
        blocks = self.req_to_blocks[request_id]
        num_source = pending.lengths.region_len // self.block_size
        own = {block.block_id for block in pending.destination[pending.num_new :]}
        source = [block for block in blocks[:num_source] if block.block_id not in own]
        blocks[:num_source] = pending.destination
        self.evicted[request_id] = self.evicted.get(request_id, 0) + pending.lengths.evicted
        self.mark_lossy(request_id)
        # Reversed as everywhere in the host: the end of a prefix is forgotten first.
        self.block_pool.free_blocks(reversed(source))
        return True

    def forget(self, request_id: str) -> None:
        """Nothing: a request's books go with its blocks."""

    def take_over(self, request_id: str, blocks: Sequence[KVCacheBlock], evicted: int) -> None:
        """A request that holds nothing begins with blocks of another, which is gone.

        They have a holder already, and `evicted` slots fewer than their tokens would need.
        """
        assert not self.req_to_blocks.get(request_id), f"{request_id} holds blocks"
        self.req_to_blocks[request_id] = list(blocks)
        self.num_cached_block[request_id] = 0  # to the host it is under way: it looks up no hits
        if evicted:
            self.evicted[request_id] = evicted
        self.mark_lossy(request_id)

    def mark_lossy(self, request_id: str) -> None:
        """Hash no more blocks of a request: some group of layers has lost tokens."""
        self.lossy.add(request_id)

    def give_up_view(self, request_id: str) -> int:
        """Return a view's blocks to the pool; how many there were.

        They may be handed out at once: the drafts that read them are queued on the device before
        any later step's writes.
        """
        view = self.views.pop(request_id, [])
        self.block_pool.free_blocks(reversed(view))
        return len(view)

    def commit_view(self, request_id: str) -> None:
        """Keep the destinations beside the request's blocks, which stay as they are."""
        # What was read before this view may be handed out at once: drafts of later steps alone
        # could write there, and they follow the copy on the device.
        self.block_pool.free_blocks(reversed(self.views.pop(request_id, [])))
        pending = self._pending_views.pop(request_id, None)
        if pending is not None:
            self.views[request_id] = pending

    # --- host overrides -------------------------------------------------------------------

    def get_num_blocks_to_allocate(  # type: ignore[no-untyped-def, override]
        self, request_id: str, num_tokens: int, *args, **kwargs
    ) -> int:
        """Count blocks for the physical length; for admission, for the most it will ever be."""
        physical = num_tokens - self.evicted.get(request_id, 0)
        if kwargs.get("apply_admission_cap"):
            physical = min(physical, self.most_held(request_id, num_tokens))
        return super().get_num_blocks_to_allocate(request_id, physical, *args, **kwargs)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Allocate blocks for the physical length."""
        physical = num_tokens - self.evicted.get(request_id, 0)
        return super().allocate_new_blocks(request_id, physical, num_tokens_main_model)

    def cache_blocks(  # type: ignore[no-untyped-def, override]
        self, request: Request, num_tokens: int, *args, **kwargs
    ) -> None:
        """Hash blocks for the prefix cache, until the request is compacted in any group.

        Afterwards its blocks no longer hold consecutive tokens, or what they hold was computed
        over a compacted past. What was hashed before stays.
        """
        if request.request_id not in self.lossy:
            super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request and return all its blocks, those of plans and views included."""
        blocks = super().pop_blocks_for_free(request_id)
        self.evicted.pop(request_id, None)
        self.lossy.discard(request_id)
        pending = self._pending.pop(request_id, None)
        views = self.views.pop(request_id, []) + self._pending_views.pop(request_id, [])
        promised = self.promised.pop(request_id, [])
        return [*blocks, *views, *promised, *(pending.new if pending else ())]

    # --- tests ----------------------------------------------------------------------------

    def held_blocks(self) -> Sequence[KVCacheBlock]:
        """Every block this group's requests hold now, pending destinations included."""
        held = [block for blocks in self.req_to_blocks.values() for block in blocks]
        for pending in self._pending.values():
            held += pending.new
        for beside in (self.views, self._pending_views, self.promised):
            held += [block for blocks in beside.values() for block in blocks]
        return held

    def taken(self, request_id: str) -> list[KVCacheBlock]:
        """A request's blocks as they will be once what is planned for it is committed."""
        pending = self._pending.get(request_id)
        return self.req_to_blocks[request_id] if pending is None else pending.destination

    def check_integrity(self) -> None:
        """Raise AssertionError if the books contradict each other."""
        for block in self.held_blocks():
            assert block.is_null or block.ref_cnt > 0, f"block {block.block_id} is held and free"
        for request_id, pending in self._pending.items():
            own = pending.destination[pending.num_new :]
            assert all(block in self.req_to_blocks[request_id] for block in own), request_id
            assert all(block.ref_cnt == 1 and block.block_hash is None for block in own), request_id
        own = [each for each in self._pending.values() if not each.is_adopted]
        private = [block.block_id for each in own for block in each.destination]
        for views in (self.views, self._pending_views):
            private += [block.block_id for view in views.values() for block in view]
        assert len(private) == len(set(private)), "a destination block has two owners"
        assert self.evicted.keys() <= self.lossy, "a compacted request may still hash blocks"
        kept = (*self.evicted, *self.lossy, *self._pending, *self._pending_views, *self.views)
        for request_id in (*kept, *self.promised):
            assert request_id in self.req_to_blocks, f"{request_id} left its books behind"


def register_manager() -> None:
    """Tell vLLM that our manager serves our specs. Idempotent."""
    # The registry fills itself with the built-in specs only while it is empty.
    KVCacheSpecRegistry._ensure_registered()
    for spec in (CompressedAttentionSpec, CompressedMLASpec):
        KVCacheSpecRegistry.register(
            spec, CompressedAttentionManager, uniform_type_base_spec=FullAttentionSpec
        )

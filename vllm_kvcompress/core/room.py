"""Blocks of the pool: what a compaction gains, where its survivors go, and what gives way.

Three rules, so that compression never makes a server slower to serve than without it, and tokens do
not depend on how full the pool is:

1. A compaction happens where it frees more blocks than it takes. A block that another request
   holds too does not come free, unless that request is compacted in the same step. With the
   setting's `shared_blocks: always` it happens in any case, and blocks for it are set aside from
   the start: reserve.py.
2. Such a compaction never waits. It takes free blocks, and where there are too few of them it
   overwrites blocks that its own request gives up: by rule 1 there are enough.
3. Caches that outlive their requests, and views that drafts read, are memory for speed alone. They
   are given back, in this order, before a request is preempted, before one has to wait, and before
   a compaction overwrites anything.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.core.continuation import Continuation
from vllm_kvcompress.core.host_groups import HostGroup
from vllm_kvcompress.core.kept_store import KeptCaches
from vllm_kvcompress.core.reserve import Reserve
from vllm_kvcompress.core.sharing import families
from vllm_kvcompress.core.spare_slots import SpareSlots
from vllm_kvcompress.plans import GroupLengths

Lengths = Sequence[GroupLengths | None]


@dataclass
class Room:
    """The pool from the point of view of compactions and views.

    Attributes
    ----------
    managers : sequence of (CompressedAttentionManager or HostGroup)
        One per KV cache group.
    layer_group_of : sequence of (int or None)
        Layer group of every KV cache group; None for one that is never compacted.
    pool : BlockPool
        vLLM's.
    max_model_len : int
        Tokens of the longest sequence.
    give_up_view : callable
        Gives the blocks of one view back; False if there is none.
    num_lacking : int
        Blocks that a request asked for and did not get, in the step that is being scheduled; the
        most of all requests.
    kept : KeptCaches or None
        Caches that outlive their requests.
    reserve : Reserve or None
        Blocks that are set aside for compactions of requests that share blocks; None where such
        compactions happen only if they pay.
    """

    managers: Sequence[CompressedAttentionManager | HostGroup]
    layer_group_of: Sequence[int | None]
    pool: Any
    max_model_len: int
    give_up_view: Callable[[], bool] = lambda: False
    num_lacking: int = 0
    kept: KeptCaches | None = None
    reserve: Reserve | None = None
    _declined: dict[str, tuple[frozenset[str], int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = [each for each in self.managers if isinstance(each, CompressedAttentionManager)]
        # Windowed and recurrent layers give blocks back in steps that need none: vLLM must be asked
        # always.
        is_alone = len(own) == len(self.managers)
        self._spare = None
        if is_alone:
            self._spare = SpareSlots(own, self.pool, self.max_model_len, self.num_set_aside)

    @property
    def num_free(self) -> int:
        """Blocks that are free now."""
        return self.pool.get_num_free_blocks()

    @property
    def num_held(self) -> int:
        """Blocks that requests hold; those that are only cached, or kept for others, are free."""
        num_kept = self.kept.num_idle if self.kept is not None else 0
        return self.num_usable - self.num_free - num_kept

    def num_set_aside(self, without: str | None = None) -> int:
        """Free blocks that coming compactions need, but for that of the request `without`."""
        return 0 if self.reserve is None else self.reserve.num_blocks(without=without)

    def waiting_blocks(self) -> list[KVCacheBlock]:
        """Blocks of caches that outlive their requests."""
        return [] if self.kept is None else self.kept.held_blocks()

    @property
    def num_usable(self) -> int:
        """Blocks of the pool but the null block."""
        return self.pool.num_gpu_blocks - 1

    def _groups(self, lengths: Lengths) -> list[tuple[CompressedAttentionManager, GroupLengths]]:
        """The KV cache groups that a compaction of such lengths touches."""
        found = []
        for manager, number in zip(self.managers, self.layer_group_of, strict=True):
            each = None if number is None else lengths[number]
            if each is not None and isinstance(manager, CompressedAttentionManager):
                found.append((manager, each))
        return found

    def num_needed(self, lengths: Lengths) -> int:
        """Destination blocks of all KV cache groups."""
        groups = self._groups(lengths)
        return sum(each.kept_len // manager.block_size for manager, each in groups)

    def num_growth(self, request_id: str, num_tokens: int, is_compacted: bool = True) -> int:
        """Blocks a request still needs until it has `num_tokens` tokens.

        It is compacted at its marks until then, unless `is_compacted` is False.
        """
        missing = 0
        for manager in self.managers:
            physical = num_tokens - manager.evicted.get(request_id, 0)
            if is_compacted and isinstance(manager, CompressedAttentionManager):
                physical = min(physical, manager.most_held(request_id, num_tokens))
            held = len(manager.req_to_blocks.get(request_id, ()))
            grown = max(-(-physical // manager.block_size) - held, 0)
            bound = manager.most_blocks if isinstance(manager, HostGroup) else None
            missing += grown if bound is None else min(grown, bound)
        return missing

    def clip(self, request: Request, num_computed: int, num_new: int) -> int:
        """Tokens of a step, of `num_new`, that fit without a preemption; at least 1.

        For a request whose compaction waits for others to give its blocks up. A longer step might
        preempt all of these, find that there are too few blocks even so, and preempt the request
        itself: all would begin again, alike, for ever. Behind a step of one token it is compacted.
        """
        room = self.num_free - self.num_set_aside()
        room += 0 if self.kept is None else self.kept.num_idle
        name = request.request_id
        low, high = 1, num_new
        while low < high:
            middle = (low + high + 1) // 2
            if self.num_growth(name, num_computed + middle, is_compacted=False) <= room:
                low = middle
            else:
                high = middle - 1
        return low

    # --- what a compaction gains ----------------------------------------------------------

    def note_change(self, request_id: str | None = None) -> None:
        """Blocks have lost an owner: what was declined may be worth it now.

        `request_id` is a request that has gone.
        """
        self._declined = {}
        if self.reserve is not None:
            self.reserve.note_change(request_id)
        if request_id is not None and self._spare is not None:
            self._spare.forget(request_id)

    def _sources(self, request_id: str, lengths: Lengths) -> list[KVCacheBlock]:
        return [
            block
            for manager, each in self._groups(lengths)
            for block in manager.req_to_blocks[request_id][: each.region_len // manager.block_size]
        ]

    def worthwhile(self, due: Mapping[str, Lengths]) -> set[str]:
        """Of the compactions that are due, those that give back more blocks than they take.

        Alone, a request gives back the blocks that only it holds. Requests that share blocks and
        are due together give these back too, if nobody else holds them and there are free blocks
        for all of their survivors.
        """
        # What decides: who holds which blocks, who else is due, and how far regions have grown.
        names = frozenset(due)
        seen = {
            name: (names, sum(each.region_len for each in lengths if each))
            for name, lengths in due.items()
        }
        if all(self._declined.get(name) == state for name, state in seen.items()):
            return set()
        alone, together = self.gains(due)
        needs = {name: self.num_needed(lengths) for name, lengths in due.items()}
        chosen = set(alone)
        num_free = self.num_free - sum(needs[name] for name in chosen)
        for family in together:
            taken = sum(needs[name] for name in family)
            if taken <= num_free:
                num_free -= taken
                chosen |= family
        if not alone and not together:  # else blocks lose an owner, or may come free
            self._declined |= seen
        return chosen

    def gains(self, due: Mapping[str, Lengths]) -> tuple[dict[str, int], dict[frozenset[str], int]]:
        """Blocks that compactions give back more than they take, where they do.

        Returns
        -------
        tuple of (dict, dict)
            By request, of those that are worth it alone; and by sets of requests that share blocks
            and are worth it together only, beside the former.
        """
        needs = {name: self.num_needed(lengths) for name, lengths in due.items()}
        sources = {name: self._sources(name, lengths) for name, lengths in due.items()}
        own = {name: sum(b.ref_cnt == 1 for b in blocks) for name, blocks in sources.items()}
        shared = {name: [b for b in blocks if b.ref_cnt > 1] for name, blocks in sources.items()}
        alone = {name: own[name] - needs[name] for name in due if own[name] > needs[name]}
        together = {}
        for family in families(shared):
            others = family - alone.keys()
            gain = sum(own[name] - needs[name] for name in others)
            gain += _shared_gain(shared, family) - _shared_gain(shared, family & alone.keys())
            if others and gain > 0:
                together[frozenset(others)] = gain
        return alone, together

    def free_for(self, request_id: str, lengths: Lengths) -> None:
        """Give back what is kept and holds blocks of a compaction that lacks some.

        One that is declined is looked at again in the next step.
        """
        if self.kept is not None:
            self.kept.give_back_sharers(self._sources(request_id, lengths))

    # --- where survivors go ---------------------------------------------------------------

    def own_destinations(self, request_id: str, lengths: Lengths) -> list[int] | None:
        """Blocks of its own that an eviction overwrites, for each KV cache group; None: no room.

        As few as need be, once views have given way. What is set aside for others is left alone.
        """
        needed, aside = self.num_needed(lengths), self.num_set_aside(request_id)
        self.make_free(needed + aside)
        missing = needed - max(self.num_free - aside, 0)
        found = [0] * len(self.managers)
        if missing <= 0:
            return found
        if self.reserve is not None:
            self.free_for(request_id, lengths)
        for place, (manager, number) in enumerate(
            zip(self.managers, self.layer_group_of, strict=True)
        ):
            each = None if number is None else lengths[number]
            if each is not None and isinstance(manager, CompressedAttentionManager):
                num_private = len(manager.private_blocks(request_id, each))
                found[place] = min(each.kept_len // manager.block_size, num_private, missing)
                missing -= found[place]
        return found if needed - sum(found) <= self.num_free else None

    # --- what gives way -------------------------------------------------------------------

    def allocate(
        self,
        allocate_slots: Callable[..., Any],
        request: Request,
        num_new_tokens: int,
        **options: Any,
    ) -> Any:
        """What vLLM's ``KVCacheManager.allocate_slots`` gives, under the rules above.

        Its caller relies on None leaving everything as it was, and on blocks for the tokens
        otherwise; a running request that gets None is preempted, or another one for it.
        """
        hits = options.get("new_computed_blocks")
        if not isinstance(hits, Continuation):
            return self._allocate(allocate_slots, request, num_new_tokens, options)
        hits.begin()
        if self.reserve is not None:
            self.reserve.note_joined()
        blocks = self._allocate(allocate_slots, request, num_new_tokens, options)
        hits.end(admitted=blocks is not None)
        return blocks

    def _allocate(
        self,
        allocate_slots: Callable[..., Any],
        request: Request,
        num_new_tokens: int,
        options: Mapping[str, Any],
    ) -> Any:
        reserve = self.reserve
        if reserve is not None:
            reserve.note(request)
        if self._spare is not None and (reserve is None or self.num_free >= reserve.num_blocks()):
            given = self._spare.take(request, num_new_tokens, options)
            if given is not None:
                return given
        num_tokens = request.num_computed_tokens + num_new_tokens
        num_tokens += options.get("num_new_computed_tokens", 0)
        must_fit = bool(options.get("full_sequence_must_fit"))
        if must_fit:
            num_tokens = max(num_tokens, request.num_tokens)
        num_tokens += options.get("num_lookahead_tokens", 0)
        num_tokens = min(num_tokens, self.max_model_len)
        hits = options.get("new_computed_blocks")
        joining = (request.request_id, hits) if hits and any(hits.blocks) else None

        def num_missing() -> int:
            growth = self.num_growth(request.request_id, num_tokens)
            # Hits that nobody holds are among the free blocks.
            return growth - (sum(b.ref_cnt > 0 for g in hits.blocks for b in g) if hits else 0)

        def num_aside() -> int:
            return 0 if reserve is None else reserve.num_blocks(joining)

        def attempt() -> Any:
            aside = num_aside()
            if not aside:
                return allocate_slots(request, num_new_tokens, **options)
            if must_fit and num_missing() + aside > self.num_free:
                return None
            kept_free = options.get("reserved_blocks", 0) + aside
            return allocate_slots(
                request, num_new_tokens, **{**options, "reserved_blocks": kept_free}
            )

        blocks = attempt()
        while blocks is None and self._give_way(num_missing() + num_aside()):
            blocks = attempt()
        if blocks is None:
            self.num_lacking = max(self.num_lacking, num_missing(), 1)
            return None
        if reserve is not None and joining is not None:
            reserve.note_joined()
        if self._spare and request.status == RequestStatus.RUNNING:
            self._spare.note(request, num_new_tokens)
        return blocks

    def make_free(self, num_blocks: int) -> bool:
        """Whether so many blocks are free, after giving back caches and views if need be."""
        while self.num_free < num_blocks:
            if not self._give_way(num_blocks):
                return False
        return True

    def _give_way(self, num_blocks: int) -> bool:
        """Give one cache or view back; False if there is none, or all would not be enough."""
        held = sum(len(view) for manager in self.managers for view in manager.views.values())
        idle = 0 if self.kept is None else self.kept.num_idle
        if held + idle == 0 or self.num_free + held + idle < num_blocks:
            return False
        if self.kept is not None and self.kept.give_way():
            return True
        return self.give_up_view()


def _shared_gain(shared: Mapping[str, Sequence[KVCacheBlock]], family: Iterable[str]) -> int:
    """Blocks that come free if all of a family are compacted, of those that several hold."""
    owners = Counter(block.block_id for name in family for block in shared[name])
    blocks = {block.block_id: block for name in family for block in shared[name]}
    return sum(blocks[number].ref_cnt == count for number, count in owners.items())

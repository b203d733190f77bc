"""Free blocks that are set aside, so that requests that share blocks are compacted at their marks.

With the setting's `shared_blocks: always` a compaction never depends on who holds its blocks, too.
It needs a destination for every survivor: free blocks, and blocks of its region that nobody else
holds. What these are too few by is set aside while the request runs: nobody else may grow, be
admitted or draft into it. Nobody may join blocks either, unless there is room for the compactions
of both sides.

How much that is. A request of which `kept` blocks survive of a region of `sources` blocks, `shared`
of these with others, needs ``max(kept - (sources - shared), 0)`` free blocks in a layer group.
Requests that share blocks need the sum, but for one of them: whoever is compacted last finds that
nobody shares its blocks any more. Which one that will be is not known, so the sum is lessened by
what the one gains that gains least. It holds in every order, as long as those that would share the
last blocks are not compacted in one step: then one of them waits for a step (`hold`).

Only the next compaction of a layer group counts. What it leaves behind is private: hits end before
a request's first mark, and behind that nothing is hashed.

A request alone shares nothing, so nothing is set aside for it, and whoever runs first can always go
on: others are preempted for it, as by vLLM wherever memory is short. Caches that wait for a
conversation's next turn do not count as sharers. They are given back before a compaction would
fail for them.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.core.host_groups import HostGroup
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.sharing import families
from vllm_kvcompress.core.tracked_request import Phase, TrackedRequest
from vllm_kvcompress.lengths.schedule import Start, compactions

Joining = tuple[str, KVCacheBlocks]
"""A request that is about to start, and the prefix-cache hits that it would hold."""


class _Coming(NamedTuple):
    """The first compaction of a layer group: where it falls due, blocks of its region, kept ones.

    `place` is the number of the KV cache group.
    """

    place: int
    position: int
    num_sources: int
    num_kept: int

    def num_lacking(self, num_shared: int) -> int:
        """Free blocks that it needs where so many of its sources are not its own."""
        return max(self.num_kept - (self.num_sources - num_shared), 0)


class _Part(NamedTuple):
    """A compaction, and those of its blocks that others hold, too."""

    coming: _Coming
    shared: list[KVCacheBlock]


class Reserve:
    """Blocks that are set aside.

    Parameters
    ----------
    planner : Planner
        States of all requests.
    managers : sequence of (CompressedAttentionManager or HostGroup)
        One per KV cache group.
    layer_group_of : sequence of (int or None)
        Layer group of every KV cache group; None for one that is never compacted.
    max_model_len : int
        Tokens of the longest sequence.
    waiting : callable
        Blocks of caches that wait for a conversation's next turn.
    adopts : callable
        Whether a request will read what an equal one has kept, and needs no blocks for that.
    """

    def __init__(
        self,
        planner: Planner,
        managers: Sequence[CompressedAttentionManager | HostGroup],
        layer_group_of: Sequence[int | None],
        max_model_len: int,
        waiting: Callable[[], Iterable[KVCacheBlock]],
        adopts: Callable[[str], bool] = lambda request_id: False,
    ) -> None:
        self._planner, self._managers, self._layer_group_of = planner, managers, layer_group_of
        self._max_model_len, self._waiting, self._adopts = max_model_len, waiting, adopts
        self._coming: dict[str, tuple[Start | None, tuple[_Coming, ...]]] = {}
        self._ends: dict[str, int] = {}  # lengths that the step being scheduled leads to
        self._is_sharing = False  # perhaps; else nothing need be counted
        self._known: dict[Hashable, int] = {}  # counted since something changed

    # --- what happens ---------------------------------------------------------------------

    def begin_step(self) -> None:
        """What the last step compacted is committed, and another is scheduled."""
        if any(self._falls_due(name) for name in self._ends):
            self._known.clear()
        self._ends.clear()

    def note(self, request: Request) -> None:
        """A request asks for blocks: learn what is to come for it, unless that is known."""
        name = request.request_id
        tracked = self._planner.requests.get(name)
        if tracked is None:
            return
        known = self._coming.get(name)
        if known is None or known[0] is not tracked.start:
            self._coming[name] = tracked.start, tuple(self._find(request, tracked))
            self._known.clear()

    def _find(self, request: Request, tracked: TrackedRequest) -> Iterator[_Coming]:
        config, planner = tracked.config, self._planner
        if config is None or tracked.phase is Phase.SKIPPED:
            return
        end = min(request.num_prompt_tokens + request.max_tokens, self._max_model_len)
        missing = {number for number in self._layer_group_of if number is not None}
        shape = planner.num_layer_groups, planner.block_size, planner.codes_per_row
        prompt_len = tracked.prompt_len
        for each in compactions(prompt_len, end, config, *shape, start=tracked.start):
            for place, (number, manager) in enumerate(
                zip(self._layer_group_of, self._managers, strict=True)
            ):
                lengths = None if number is None else each.lengths[number]
                if lengths is not None and number in missing:
                    size = manager.block_size
                    sources, kept = lengths.region_len // size, lengths.kept_len // size
                    yield _Coming(place, each.position, sources, kept)
            missing -= {number for number, lengths in enumerate(each.lengths) if lengths}
            if not missing:
                return

    def note_joined(self) -> None:
        """A request holds blocks that others may hold, too."""
        self._is_sharing = True
        self._known.clear()

    def note_change(self, request_id: str | None = None) -> None:
        """Blocks have lost an owner; `request_id` has lost all of its blocks."""
        self._known.clear()
        if request_id is not None:
            self._coming.pop(request_id, None)
            self._ends.pop(request_id, None)

    # --- what a step may do ---------------------------------------------------------------

    def hold(self, request: Request, num_certain: int, num_new: int, num_free: int) -> int:
        """Tokens that a step may compute of `num_new`: all of them, or 0.

        A request waits where others are compacted in this step and there is room for these alone.
        In the next step they no longer share its blocks.

        Parameters
        ----------
        request : Request
            It has `num_certain` tokens whose keys are certain.
        num_certain, num_new : int
            Tokens before the step, and those of the step.
        num_free : int
            Free blocks.
        """
        self.note(request)
        name = request.request_id
        self._ends[name] = num_certain + num_new
        if not num_new or not self._falls_due(name):
            return num_new
        self._known.clear()
        if num_free < self.num_blocks() and any(
            self._falls_due(other) for other in self._ends if other != name
        ):
            del self._ends[name]
            self._known.clear()
            return 0
        return num_new

    def _falls_due(self, name: str) -> bool:
        return any(each.position <= self._ends[name] for each in self._still_to_come(name))

    def _still_to_come(self, name: str) -> Iterator[_Coming]:
        tracked = self._planner.requests.get(name)
        if tracked is not None and name in self._coming and not self._adopts(name):
            done = tracked.compaction.compacted_at
            yield from (each for each in self._coming[name][1] if each.position > done)

    # --- how much -------------------------------------------------------------------------

    def num_blocks(self, joining: Joining | None = None, without: str | None = None) -> int:
        """Free blocks that coming compactions need.

        Parameters
        ----------
        joining : tuple of (str, KVCacheBlocks) or None
            Count as if that request held these blocks.
        without : str or None
            A request that is being compacted, whose own need does not count.
        """
        if not self._is_sharing and joining is None:
            return 0
        hits = joining and tuple(b.block_id for group in joining[1].blocks for b in group)
        key = joining and joining[0], hits, without
        if key not in self._known:
            self._known[key] = self._count(joining, without)
        return self._known[key]

    def _count(self, joining: Joining | None, without: str | None) -> int:
        holders = _Holders(self._waiting(), joining)
        total, is_sharing = 0, False
        gone = Counter[int]()  # holders that give a block up before those of later steps need it
        later: dict[str, list[_Part]] = {}
        for name in self._coming:
            tracked = self._planner.requests.get(name)
            for coming in self._still_to_come(name):
                assert tracked is not None
                blocks = self._blocks(name, coming, joining)
                part = _Part(coming, holders.shared(blocks))
                is_sharing |= bool(part.shared)
                is_planned = tracked.phase is Phase.PLANNED and coming.position <= tracked.position
                if is_planned or coming.position <= self._ends.get(name, 0):
                    gone.update(block.block_id for block in part.shared)
                    if not is_planned and name != without:
                        total += coming.num_lacking(len(part.shared))
                else:
                    later.setdefault(name, []).append(part)
        if joining is None:
            self._is_sharing = is_sharing
        return total + _num_later(later, holders, gone)

    def _blocks(
        self, name: str, coming: _Coming, joining: Joining | None
    ) -> Sequence[KVCacheBlock]:
        """Blocks of its region that a request holds, or would."""
        if joining is not None and joining[0] == name:
            return joining[1].blocks[coming.place][: coming.num_sources]
        held = self._managers[coming.place].req_to_blocks.get(name, ())
        return held[: coming.num_sources]


class _Holders:
    """How many requests hold a block, `joining` included and what waits for a next turn not."""

    def __init__(self, waiting: Iterable[KVCacheBlock], joining: Joining | None) -> None:
        self._added = Counter[int]()
        if joining is not None:
            self._added.update(block.block_id for group in joining[1].blocks for block in group)
        self._added.subtract(block.block_id for block in waiting)

    def of(self, block: KVCacheBlock) -> int:
        """Of one block."""
        return block.ref_cnt + self._added[block.block_id]

    def shared(self, blocks: Iterable[KVCacheBlock]) -> list[KVCacheBlock]:
        """Blocks that more than one request holds."""
        if not self._added:  # most often, and there may be many
            return [block for block in blocks if block.ref_cnt > 1]
        return [block for block in blocks if self.of(block) > 1]


def _num_later(
    parts_of: Mapping[str, Sequence[_Part]], holders: _Holders, gone: Mapping[int, int]
) -> int:
    """Free blocks that requests need which are compacted in later steps, each in one of its own.

    `gone` says how many holders of a block will have given it up by then.
    """

    def left(block: KVCacheBlock) -> int:
        return holders.of(block) - gone[block.block_id]

    shared = dict(parts_of)
    if gone:
        for name, parts in shared.items():
            left_over = [[block for block in part.shared if left(block) > 1] for part in parts]
            shared[name] = [
                part._replace(shared=blocks) for part, blocks in zip(parts, left_over, strict=True)
            ]
    needs = {
        name: sum(part.coming.num_lacking(len(part.shared)) for part in parts)
        for name, parts in shared.items()
    }
    if not any(needs.values()):
        return 0
    blocks_of = {name: [b for part in parts for b in part.shared] for name, parts in shared.items()}
    givers = Counter(block.block_id for blocks in blocks_of.values() for block in blocks)
    found = {block.block_id: block for blocks in blocks_of.values() for block in blocks}
    staying = {number for number, count in givers.items() if left(found[number]) > count}
    spared = 0
    for family in families(blocks_of):
        if all(needs[name] for name in family):  # else one of them gains nothing
            spared += min(
                needs[name]
                - sum(
                    part.coming.num_lacking(sum(b.block_id in staying for b in part.shared))
                    for part in shared[name]
                )
                for name in family
            )
    return sum(needs.values()) - spared

"""Who holds which blocks, told by messages alone, and held against vLLM's pool after every step.

The scheduler's own books are what is checked, so nothing here comes from them: rows, evicted slots
and destinations come from what workers are sent, and whether a request has blocks from vLLM's
running list. Two things are told by no message and read where they are: what outlives its request,
and the blocks of the host's own groups.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.core.allocator.worlds import BLOCK, MAX_LEN
from tests.inside import managers
from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.messages import StepPlan
from vllm_kvcompress.plans import CompactionPlan, Purpose


@dataclass
class Held:
    """One request, as told.

    Attributes
    ----------
    row : list[list[int]]
        Block ids by KV cache group.
    evicted : list[int]
        Slots given up by KV cache group.
    peak : int
        The longest sequence it was scheduled for, in tokens.
    plan, view_plan : CompactionPlan or None
        Of the last step.
    view : tuple[int, ...]
        Blocks that drafts read in the place of the row.
    """

    row: list[list[int]]
    evicted: list[int]
    peak: int = 0
    plan: CompactionPlan | None = None
    view_plan: CompactionPlan | None = None
    view: tuple[int, ...] = ()

    @property
    def has_view(self) -> bool:
        """Whether drafts read anything but the row from the next step on."""
        return bool(self.view) or self.view_plan is not None

    def settle(self) -> None:
        """What the last step planned is done."""
        if self.plan is not None:
            for number, each in enumerate(self.plan.groups):
                if each is not None:
                    self.row[number] = list(each.block_row)
                    self.evicted[number] += each.lengths.evicted
        if self.view_plan is not None:
            self.view = _destinations(self.view_plan)
        self.plan = self.view_plan = None

    def held(self, groups: set[int]) -> list[int]:
        """Every block, those of plans that are not done yet included."""
        found = [block for number in groups for block in self.row[number]]
        found += self.view
        if self.view_plan is not None:
            found += _destinations(self.view_plan)
        if self.plan is not None:
            own = {block for each in self.plan.groups if each for block in each.source_blocks}
            found += [block for block in _destinations(self.plan) if block not in own]
        return found


def _destinations(plan: CompactionPlan) -> tuple[int, ...]:
    return tuple(block for each in plan.groups if each for block in each.destination_blocks)


@dataclass
class Ledger:
    """All requests, as told; `scheduler` is what is checked.

    Attributes
    ----------
    frozen : frozenset[int]
        Blocks that the current step may write no more: found in the prefix cache before it was
        scheduled, or held by several.
    seen : Counter[str]
        What has happened, so that a test can say that all of it did.
    """

    scheduler: Any
    requests: dict[str, Held] = field(default_factory=dict)
    frozen: frozenset[int] = frozenset()
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.managers = managers(self)
        self.own = {
            number
            for number, manager in enumerate(self.managers)
            if isinstance(manager, CompressedAttentionManager)
        }
        self._hashed: dict[int, Any] = {}
        self._holders = Counter[int]()

    # --- messages -------------------------------------------------------------------------

    def before_schedule(self) -> None:
        """Note what others may find."""
        found = ((block.block_id, block.block_hash) for block in self.pool.blocks)
        self._hashed = {number: key for number, key in found if key is not None}

    def take(self, output: Any) -> None:
        """One step's message."""
        told = StepPlan.of(output)
        for each in self.requests.values():
            each.settle()
        for name in output.finished_req_ids | (output.preempted_req_ids or set()):
            self.requests.pop(name, None)
        for name in told.views_given_up:
            if name in self.requests:
                self.requests[name].view = ()
        for new in output.scheduled_new_reqs:
            self._start(new, told, output.num_scheduled_tokens[new.req_id])
        cached = output.scheduled_cached_reqs
        for name, more, start in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            held = self.requests[name]
            for row, ids in zip(held.row, more or (), strict=False):
                row += ids
            held.peak = max(held.peak, start + output.num_scheduled_tokens[name])
        for plan in told.plans:
            self._plan(plan)
        holders = self.holders()
        # Those that left the prefix cache meanwhile are written, and may be hashed anew.
        blocks = self.pool.blocks
        hashed = {
            number for number, key in self._hashed.items() if blocks[number].block_hash is key
        }
        # What is computed in this step may be joined in this step.
        shared = {number for number, n in holders.items() if n > 1 and self._holders[number] > 1}
        self.frozen = frozenset(hashed | shared)
        self._check_lengths(output)
        self.check_pool(holders)

    def _start(self, new: Any, told: StepPlan, num_scheduled: int) -> None:
        setup, count = told.setups.get(new.req_id), len(new.block_ids)
        evicted = list(setup.evicted) if setup and setup.evicted else []
        evicted += [0] * (count - len(evicted))
        row = [list(ids) for ids in new.block_ids]
        peak = new.num_computed_tokens
        self.requests[new.req_id] = Held(row, evicted, peak + num_scheduled)
        self.seen["continued"] += any(evicted)
        self.seen["hits"] += peak > 0 and not any(evicted)

    def _plan(self, plan: CompactionPlan) -> None:
        held = self.requests[plan.request_id]
        taken = Counter(_destinations(plan))
        assert max(taken.values(), default=1) == 1, f"{plan.request_id}: a destination twice"
        for number, each in enumerate(plan.groups):
            if each is None:
                continue
            row = [*each.source_blocks, *each.tail_blocks]
            assert held.row[number] == row, f"{plan.request_id}: the plan is of another row"
            assert len(each.source_blocks) * BLOCK == each.lengths.region_len
            if plan.purpose is not Purpose.LINKED_VIEW:
                assert len(each.destination_blocks) * BLOCK == each.lengths.kept_len
            self.seen["in place"] += each.in_place
        if plan.purpose is Purpose.ADOPT:
            held.plan = plan
            self.seen["of equal prompts"] += 1
        elif plan.purpose is Purpose.EVICT:
            held.plan = plan
            self.seen["while decoding" if plan.while_decoding else "of prompts"] += 1
        else:
            held.view_plan = plan
            self.seen["views"] += 1

    # --- checks ---------------------------------------------------------------------------

    def holders(self) -> Counter[int]:
        """How many hold each block."""
        found = Counter[int]()
        for request in self.scheduler.running:
            found.update(self.requests[request.request_id].held(self.own))
        for block in self.scheduler.reuse.kept.held_blocks():
            found[block.block_id] += 1
        for number, manager in enumerate(self.managers):
            if number not in self.own:
                found.update(block.block_id for block in manager.held_blocks())
                continue
            for promised in manager.promised.values():  # an equal prompt's survivors
                found.update(block.block_id for block in promised)
        return found

    def check_pool(self, holders: Counter[int] | None = None) -> None:
        """Every block is free, or has as many holders as references; none is both or neither."""
        holders = self._holders = self.holders() if holders is None else holders
        for block in self.pool.blocks:
            if not block.is_null:
                count = holders[block.block_id]
                assert block.ref_cnt == count, (
                    f"block {block.block_id}: {block.ref_cnt} references, {count} holders"
                )
        free = [block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()]
        assert len(free) == len(set(free)) == self.pool.get_num_free_blocks(), "freed twice"
        assert not holders.keys() & set(free), "free, and held"
        assert len(free) + len(holders) == self.pool.num_gpu_blocks - 1, "a block is lost"

    def _check_lengths(self, output: Any) -> None:
        """Rows are the scheduler's blocks, and as long as lengths and evicted slots say."""
        ahead = self.scheduler.num_lookahead_tokens
        for request in self.scheduler.running:
            name = request.request_id
            held = self.requests[name]
            for number, manager in enumerate(self.managers):
                row, blocks = held.row[number], manager.req_to_blocks[name]
                if number not in self.own:
                    # vLLM tells nobody that it gives blocks back.
                    pairs = zip(row, blocks, strict=True)
                    assert all(block.is_null or ours == block.block_id for ours, block in pairs)
                    continue
                assert row == [block.block_id for block in blocks], f"{name}: another row"
                lost = held.evicted[number]
                assert manager.evicted.get(name, 0) == lost, f"{name}: evicted slots"
                least = request.num_computed_tokens - lost
                most = min(held.peak + ahead, MAX_LEN) - lost
                assert least <= len(row) * BLOCK < most + BLOCK, (
                    f"{name}: {len(row)} blocks for {least} to {most} slots"
                )

"""A worker that knows nothing but what it is told, and remembers which token lies in every slot.

It does in order what steps ask for: it writes the tokens that are computed to the slots that rows
and evicted slots say, and carries compactions out, with survivors by chance. Before it computes, it
looks at all that a request attends to: a block that was given away too early, a row that is not
what the scheduler believes, or a cache of another conversation shows as a wrong token.
"""

import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm_kvcompress.messages import StepPlan
from vllm_kvcompress.plans import CompactionPlan, GroupPlan, Purpose

REJECTED = -1


class Slot(NamedTuple):
    """A token's place in its sequence, the token, its salt, and whether all before it was whole."""

    position: int
    token: int
    salt: str | None
    is_exact: bool


@dataclass
class Row:
    """One request, as told."""

    tokens: list[int]
    salt: str | None
    blocks: list[list[int]]
    evicted: list[int]
    num_computed: int
    is_exact: bool = True


@dataclass
class ToldWorker:
    """Rows and memory of all groups.

    Attributes
    ----------
    num_computed : dict[str, int]
        Prompt tokens that each request has computed, so far.
    begun : dict[str, tuple[int, ...]]
        Slots that requests had evicted when they started last.
    """

    block_size: int
    salts: dict[str, str | None]
    rng: random.Random
    rows: dict[str, Row] = field(default_factory=dict)
    memory: dict[tuple[int, int, int], Slot] = field(default_factory=dict)
    num_computed: dict[str, int] = field(default_factory=dict)
    begun: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def run(self, output: Any, sampled: dict[str, list[int]]) -> None:
        """One step, in which some requests sample tokens; what is behind a stop is among them."""
        for name in output.finished_req_ids | (output.preempted_req_ids or set()):
            self.rows.pop(name, None)
        plan = StepPlan.of(output)
        for new in output.scheduled_new_reqs:
            self._start(new, plan)
        cached = output.scheduled_cached_reqs
        for name, ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            for blocks, more in zip(self.rows[name].blocks, ids or (), strict=False):
                blocks += more
        for name, count in output.num_scheduled_tokens.items():
            drafts = len(output.scheduled_spec_decode_tokens.get(name, ()))
            self._compute(name, count, sampled.get(name, []), drafts)
        for each in plan.plans:
            self._compact(each)

    def _start(self, new: Any, plan: StepPlan) -> None:
        setup = plan.setups.get(new.req_id)
        groups = len(new.block_ids)
        evicted = list(setup.evicted) if setup and setup.evicted else [0] * groups
        self.begun[new.req_id] = tuple(evicted)
        self.rows[new.req_id] = Row(
            tokens=list(new.prefill_token_ids),
            salt=self.salts.get(new.req_id),
            blocks=[list(ids) for ids in new.block_ids],
            evicted=evicted,
            num_computed=new.num_computed_tokens,
            is_exact=not any(evicted),
        )

    def _place(self, row: Row, group: int, slot: int) -> tuple[int, int, int]:
        number, offset = divmod(slot, self.block_size)
        return group, row.blocks[group][number], offset

    def _compute(self, name: str, count: int, sampled: list[int], num_drafts: int) -> None:
        row = self.rows[name]
        self._check(name, row)
        start, known = row.num_computed, len(row.tokens)
        num_accepted = max(len(sampled) - 1, 0)
        assert num_accepted <= num_drafts and start + count <= known + num_drafts, name
        tokens = [*row.tokens, *sampled[:num_accepted]]
        for position in range(start, start + count):
            token = tokens[position] if position < known + num_accepted else REJECTED
            for group, evicted in enumerate(row.evicted):
                slot = Slot(position, token, row.salt, row.is_exact)
                self.memory[self._place(row, group, position - evicted)] = slot
        self.num_computed[name] = self.num_computed.get(name, 0) + count - num_drafts
        row.num_computed += count - (num_drafts - num_accepted if sampled else 0)
        row.tokens += sampled

    def _check(self, name: str, row: Row) -> None:
        """All that the request attends to is its own, in order, and ends where it goes on."""
        for group, evicted in enumerate(row.evicted):
            held = [
                self.memory[self._place(row, group, slot)]
                for slot in range(row.num_computed - evicted)
            ]
            positions = [each.position for each in held]
            assert positions == sorted(set(positions)), (name, group, positions)
            assert not held or positions[-1] == row.num_computed - 1, (name, group, positions)
            assert all(each.token == row.tokens[each.position] for each in held), (name, group)
            assert all(each.salt == row.salt for each in held), (name, group)
            assert not row.is_exact or all(each.is_exact for each in held), (name, group)

    def _compact(self, plan: CompactionPlan) -> None:
        row = self.rows[plan.request_id]
        for group, each in enumerate(plan.groups):
            if each is None:
                continue
            lengths, size = each.lengths, self.block_size
            assert row.blocks[group] == [*each.source_blocks, *each.tail_blocks], plan.request_id
            if plan.purpose is Purpose.ADOPT:
                self._take_row(row, group, each)
                continue
            forced = {n for a, b in each.forced for n in range(a, min(b, lengths.region_len))}
            others = sorted(set(range(lengths.region_len)) - forced)
            chosen = forced | set(self.rng.sample(others, lengths.kept_len - len(forced)))
            kept = [self.memory[self._place(row, group, slot)] for slot in sorted(chosen)]
            for slot, content in enumerate(kept):
                place = group, each.destination_blocks[slot // size], slot % size
                self.memory[place] = content
            self._take_row(row, group, each)

    @staticmethod
    def _take_row(row: Row, group: int, plan: GroupPlan) -> None:
        row.blocks[group] = list(plan.block_row)
        row.evicted[group] += plan.lengths.evicted
        row.is_exact = False

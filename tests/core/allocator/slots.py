"""What lies in every slot: a worker that does what messages say and looks at all that is attended.

Every slot remembers which token of which text it holds, in which group, and whether all that the
token attended to was whole. Before a request computes, the slots of its row must hold exactly the
tokens that it should: all of them, or those that its compactions kept, in order. A block that is
written while others may read it is found at once.
"""

import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.core.allocator.worlds import BLOCK, WINDOW
from vllm_kvcompress.messages import StepPlan
from vllm_kvcompress.plans import CompactionPlan, GroupPlan, Purpose

NOBODY = -1
"""In the place of a token that was rejected, or drafted."""


class Slot(NamedTuple):
    """A token's KV cache group, its place in its sequence, and what it was computed from."""

    group: int
    position: int
    token: int
    salt: str | None
    is_exact: bool


@dataclass
class Sequence:
    """One request, as told.

    Attributes
    ----------
    tokens : list[int]
        All that are known.
    rows : list[list[int]]
        Block ids by KV cache group.
    lost : list[int]
        Slots given up by KV cache group.
    expected : list[list[Slot]]
        By KV cache group, what its row should hold.
    view : dict[int, tuple[tuple[int, ...], list[Slot]]]
        Blocks that drafts read, and what they should hold, by KV cache group.
    """

    tokens: list[int]
    salt: str | None
    rows: list[list[int]]
    lost: list[int]
    num_computed: int
    is_exact: bool
    expected: list[list[Slot]] = field(default_factory=list)
    view: dict[int, tuple[tuple[int, ...], list[Slot]]] = field(default_factory=dict)


@dataclass
class Slots:
    """Memory of all groups: blocks are one pool's, whatever group they serve.

    Attributes
    ----------
    kinds : list[str]
        By KV cache group: "own", "window" or "states".
    salts : dict[str, str or None]
        By request.
    """

    kinds: list[str]
    rng: random.Random
    salts: dict[str, str | None] = field(default_factory=dict)
    sequences: dict[str, Sequence] = field(default_factory=dict)
    memory: dict[int, list[Slot | None]] = field(default_factory=dict)
    frozen: frozenset[int] = frozenset()

    def wipe(self) -> None:
        """Device memory is discarded."""
        self.memory.clear()

    def run(self, output: Any, sampled: dict[str, list[int]], frozen: frozenset[int]) -> None:
        """One step, in the order of the device, in which some requests sample tokens."""
        self.frozen = frozen
        told = StepPlan.of(output)
        for name in output.finished_req_ids | (output.preempted_req_ids or set()):
            self.sequences.pop(name, None)
        for name in told.views_given_up:
            if name in self.sequences:  # else it has gone since
                self.sequences[name].view.clear()
        for new in output.scheduled_new_reqs:
            self._start(new, told)
        cached = output.scheduled_cached_reqs
        for name, more in zip(cached.req_ids, cached.new_block_ids, strict=True):
            for row, ids in zip(self.sequences[name].rows, more or (), strict=False):
                row += ids
        starts = {name: self.sequences[name].num_computed for name in output.num_scheduled_tokens}
        for name, count in output.num_scheduled_tokens.items():
            drafts = len(output.scheduled_spec_decode_tokens.get(name, ()))
            self._compute(name, count, sampled.get(name, []), drafts)
        # One may read what another has computed in the same step: every layer writes first.
        for name, start in starts.items():
            self._check(name, start)
        for plan in sorted(told.plans, key=lambda each: not each.purpose.is_view):
            self._compact(plan)  # a view beside an eviction is of the same region
        for name in output.num_scheduled_tokens:
            self._draft(name, told.num_draft_steps if sampled.get(name) else 0)

    # --- memory ---------------------------------------------------------------------------

    def _write(self, block: int, offset: int, slot: Slot) -> None:
        assert block not in self.frozen, f"block {block} is written, and others may read it"
        self.memory.setdefault(block, [None] * BLOCK)[offset] = slot

    def _read(self, blocks: Any, count: int, first: int = 0) -> list[Slot | None]:
        found: list[Slot | None] = []
        for block in blocks[first // BLOCK : -(-count // BLOCK)]:
            found += self.memory.get(block, [None] * BLOCK)
        skipped = first // BLOCK * BLOCK
        return found[first - skipped : count - skipped]

    # --- what a step does -----------------------------------------------------------------

    def _start(self, new: Any, told: StepPlan) -> None:
        name, setup, computed = new.req_id, told.setups.get(new.req_id), new.num_computed_tokens
        lost = list(setup.evicted) if setup and setup.evicted else []
        is_exact = not any(lost)
        lost += [0] * (len(self.kinds) - len(lost))
        rows = [list(ids) for ids in new.block_ids]
        tokens, salt = list(new.prefill_token_ids), self.salts.get(name)
        made = Sequence(tokens, salt, rows, lost, computed, is_exact)
        for group, row in enumerate(rows):
            if is_exact:
                held = [Slot(group, n, tokens[n], salt, True) for n in range(computed)]
            else:  # which tokens an earlier turn or a prefix has kept, no message says
                held = self._continued(name, group, self._read(row, computed - lost[group]), made)
            made.expected.append(held)
        self.sequences[name] = made

    @staticmethod
    def _continued(name: str, group: int, found: list[Slot | None], made: Sequence) -> list[Slot]:
        held = [each for each in found if each is not None]
        places = [each.position for each in held]
        assert len(held) == len(found) and places == sorted(set(places)), (name, places)
        assert places[-1] == made.num_computed - 1, (name, places)
        for each in held:
            assert (each.group, each.salt) == (group, made.salt), (name, each)
            assert each.token == made.tokens[each.position], (name, each)
        return held

    def _check(self, name: str, start: int) -> None:
        """All that the request attends to, from token `start` on, is what it should be."""
        own = self.sequences[name]
        for group, kind in enumerate(self.kinds):
            count = own.num_computed - own.lost[group]
            assert kind == "states" or len(own.expected[group]) == count, name
            if kind == "own":
                first = 0
            elif kind == "window":
                first = max(start - WINDOW + 1, 0)
            else:
                continue
            found, expected = self._read(own.rows[group], count, first), own.expected[group][first:]
            if found != expected:
                wrong = [pair for pair in zip(found, expected, strict=True) if len(set(pair)) > 1]
                raise AssertionError(f"{name} attends to {wrong[0][0]} instead of {wrong[0][1]}")
        for blocks, kept in own.view.values():
            assert self._read(blocks, len(kept)) == kept, f"{name}: another view"

    def _compute(self, name: str, count: int, sampled: list[int], num_drafts: int) -> None:
        own = self.sequences[name]
        start, known = own.num_computed, len(own.tokens)
        num_accepted = max(len(sampled) - 1, 0)
        assert num_accepted <= num_drafts, f"{name}: {num_accepted} of {num_drafts} drafts"
        assert start + count <= known + num_drafts, f"{name}: {start}+{count}, {known}+{num_drafts}"
        own.tokens += sampled
        end = start + count - (num_drafts - num_accepted if sampled else 0)
        for group, kind in enumerate(self.kinds):
            if kind == "states":
                continue
            expected, row, lost = own.expected[group], own.rows[group], own.lost[group]
            for position in range(start, start + count):
                is_certain = position < known + num_accepted
                token = own.tokens[position] if is_certain else NOBODY
                slot = Slot(group, position, token, own.salt, own.is_exact)
                number, offset = divmod(position - lost, BLOCK)
                self._write(row[number], offset, slot)
                if position < end:
                    expected.append(slot)
        own.num_computed = end

    def _compact(self, plan: CompactionPlan) -> None:
        own = self.sequences[plan.request_id]
        for group, each in enumerate(plan.groups):
            if each is None or plan.purpose is Purpose.LINKED_VIEW:
                continue
            lengths = each.lengths
            assert own.rows[group] == [*each.source_blocks, *each.tail_blocks], plan.request_id
            if plan.purpose is Purpose.ADOPT:
                self._take_row(own, group, each, self._adopted(own, group, each))
                continue
            forced = {n for a, b in each.forced for n in range(a, min(b, lengths.region_len))}
            others = [n for n in range(lengths.region_len) if n not in forced]
            chosen = sorted(forced | set(self.rng.sample(others, lengths.kept_len - len(forced))))
            # Of the memory, not of what is expected there: others may have written it by now.
            held = self._read(own.rows[group], lengths.region_len)
            expected = [own.expected[group][place] for place in chosen]
            for number, place in enumerate(chosen):
                slot = held[place]
                assert slot is not None, plan.request_id
                self._write(each.destination_blocks[number // BLOCK], number % BLOCK, slot)
            if plan.purpose is Purpose.COPIED_VIEW:
                own.view[group] = each.destination_blocks, expected
                continue
            self._take_row(own, group, each, expected)
        if not plan.purpose.is_view:
            own.is_exact = False

    @staticmethod
    def _take_row(own: Sequence, group: int, plan: GroupPlan, kept: list[Slot]) -> None:
        own.expected[group] = kept + own.expected[group][plan.lengths.region_len :]
        own.rows[group] = list(plan.block_row)
        own.lost[group] += plan.lengths.evicted

    def _adopted(self, own: Sequence, group: int, plan: GroupPlan) -> list[Slot]:
        """What an equal request has kept: tokens of this prompt, the forced ones with them."""
        lengths, expected = plan.lengths, own.expected[group]
        kept = [each for each in self._read(plan.destination_blocks, lengths.kept_len) if each]
        places = [each.position for each in kept]
        assert len(kept) == lengths.kept_len and places == sorted(set(places))
        assert kept == [expected[place] for place in places], "not the survivors of an equal prompt"
        forced = {n for a, b in plan.forced for n in range(a, min(b, lengths.region_len))}
        assert forced <= set(places)
        return kept

    def _draft(self, name: str, count: int) -> None:
        """Drafts write behind what is computed, where the request has slots."""
        own = self.sequences[name]
        for group in own.view if count else ():
            for position in range(own.num_computed, own.num_computed + count):
                number, offset = divmod(position - own.lost[group], BLOCK)
                if number < len(own.rows[group]):
                    slot = Slot(group, position, NOBODY, own.salt, own.is_exact)
                    self._write(own.rows[group][number], offset, slot)

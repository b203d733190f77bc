"""Slots of the ring in vLLM's own schedulers: a worker finds recorded what compactions read."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.core.test_scheduler_loop import BLOCK, LOOPS, SETTING, prompt
from tests.core.told_worker import ToldWorker
from tests.core.watched_loop import Watched, watch
from tests.inside import preempt
from vllm_kvcompress.lengths.decode_queries import MIN_SLOTS
from vllm_kvcompress.messages import StepPlan
from vllm_kvcompress.plans import CompactionPlan

WINDOW, INTERVAL = 8, 64
SNAPKV = {**SETTING, "preset": "snapkv", "observation_window": WINDOW}
PRESSURE = {**SNAPKV, "trigger": "pressure", "interval": 32}
WAITING = {**SNAPKV, "trigger": "interval", "interval": INTERVAL}
VIEWS = {
    **SNAPKV, "mode": "draft", "draft": {"tokens": 3, "refresh_every": INTERVAL},
}  # fmt: skip


class RecordingWorker(ToldWorker):
    """Knows whose queries to record by what it is told, and for which tokens it did."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.slots: dict[str, int] = {}
        self.recorded: dict[str, set[int]] = {}
        self.marks: dict[str, list[int]] = {}
        """Where compactions and views read what was recorded, by request."""

    def run(self, output: Any, sampled: dict[str, list[int]]) -> None:
        self._leave(output.finished_req_ids | (output.preempted_req_ids or set()))
        changes = StepPlan.of(output).query_slots
        self._leave(changes)
        for name, slot in changes.items():
            if slot >= 0:
                assert slot < MIN_SLOTS and slot not in self.slots.values()
                self.slots[name], self.recorded[name] = slot, set()
        super().run(output, sampled)

    def _leave(self, names: Iterable[str]) -> None:
        for name in names:
            self.slots.pop(name, None)
            self.recorded.pop(name, None)

    def _compute(self, name: str, count: int, sampled: list[int], num_drafts: int) -> None:
        if name in self.slots:
            start = self.rows[name].num_computed
            self.recorded[name] |= set(range(start, start + count))
        super()._compute(name, count, sampled, num_drafts)

    def _compact(self, plan: CompactionPlan) -> None:
        if plan.while_decoding:
            window = set(range(plan.position - WINDOW, plan.position))
            assert window <= self.recorded.get(plan.request_id, set()), plan.request_id
            self.marks.setdefault(plan.request_id, []).append(plan.position)
        if not plan.purpose.is_view:
            super()._compact(plan)


def made(probe_model: str, kind: str, setting: Any, num_blocks: int = 600) -> Watched:
    loop = Watched(probe_model, *LOOPS[kind], num_blocks, setting=setting, max_num_seqs=12)
    loop.worker = RecordingWorker(BLOCK, {}, loop.random)
    return watch(loop)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_every_window_is_recorded_although_some_wait_for_a_slot(
    kind: str, probe_model: str
) -> None:
    loop = made(probe_model, kind, WAITING)
    requests = [loop.add(f"r{n}", prompt(5, n), 150) for n in range(12)]
    slots = loop.scheduler.query_slots
    while not loop.stats.deferrals:
        loop.step()
    assert slots.num_free == 0 and len(slots.owned) == MIN_SLOTS
    preempted, aborted, *_ = (each for each in requests if each.request_id in slots.owned)
    preempt(SimpleNamespace(scheduler=loop.scheduler), preempted)
    loop.scheduler.finish_requests(aborted.request_id, RequestStatus.FINISHED_ABORTED)
    loop.scheduler.check_integrity()
    assert slots.num_free == 2, "a preempted request starts with nothing"
    loop.run()
    marks = loop.worker.marks
    assert all(marks[each.request_id][0] == 5 + INTERVAL for each in requests if each != aborted)
    assert loop.stats.compactions == {"snapkv/decode": sum(map(len, marks.values()))}
    assert slots.num_free == MIN_SLOTS and loop.pool.get_num_free_blocks() == loop.usable


def test_views_are_taken_again_when_they_are_due_where_slots_are_free(probe_model: str) -> None:
    """Or up to three accepted drafts later."""
    loop = made(probe_model, "sync", VIEWS)
    for number in range(4):
        loop.add(f"r{number}", prompt(100 + number, number), 150)
    loop.run()
    for number in range(4):
        taken_at = 100 + number
        for mark in loop.worker.marks[f"r{number}"]:
            assert 0 <= mark - taken_at - INTERVAL <= 3, (number, mark, taken_at)
            taken_at = mark
    assert loop.stats.views == {"snapkv/prompt": 4, "snapkv/refresh": 2 * 4}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_under_pressure_nobody_is_compacted_who_has_not_recorded(
    kind: str, probe_model: str
) -> None:
    """Uncompressed, the four would need 96 blocks. The last makes memory scarce as it starts; the
    others record first."""
    loop = made(probe_model, kind, PRESSURE, 1 + 2 * 28)
    requests = [loop.add(f"r{n}", prompt(90, 7 * n), 100) for n in range(4)]
    loop.run()
    marks = loop.worker.marks
    assert marks.keys() == {"r0", "r1", "r2"} and loop.stats.deferrals == 0
    assert loop.stats.compactions == {
        "snapkv/prompt": 1, "snapkv/decode": sum(map(len, marks.values())),
    }  # fmt: skip
    assert not any(each.num_preemptions for each in requests)
    assert loop.pool.get_num_free_blocks() == loop.usable

"""Drafts over views in vLLM's own schedulers, without a model: how many, and what is learnt.

The drafter is made up: it drafts as many steps as the scheduler says, for every request of a step.
"""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from tests.core.test_scheduler_loop import LOOPS, Loop, prompt
from tests.inside import preempt
from vllm_kvcompress.core.draft.history import DraftHistory
from vllm_kvcompress.messages import StepPlan, StepReport

LIMIT = 3
SETTING = {
    "preset": "keydiff",
    "mode": "draft",
    "draft": {"tokens": LIMIT, "adaptive": True},
    "budget": {"tokens": 32, "floor": 1},
    "min_prompt_len": 0,
    "layer_groups": {"count": 2},
}


class Drafting(Loop):
    """A loop that drafts, and keeps a history of its own of every request that has a view."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.limits: dict[str, int] = {}
        self.histories: dict[str, DraftHistory] = {}
        self.lengths: dict[str, set[int]] = {}
        """Drafts that steps verified, by request id."""

    def _take(self, output: Any, sampled: set[str]) -> None:
        plan, names = StepPlan.of(output), list(output.num_scheduled_tokens)
        for each in plan.plans:
            name = each.request_id
            self.histories[name] = DraftHistory(self.limits.get(name, LIMIT))
        found = [self.histories[name] for name in names if name in self.histories]
        if not self.num_ahead:  # else its verdicts come a step later
            assert plan.num_draft_steps == max(
                (min(each.length + 1, each.limit) for each in found), default=0
            )
        for name, drafts in output.scheduled_spec_decode_tokens.items():
            assert self.num_ahead or len(drafts) <= self.histories[name].length
            self.lengths.setdefault(name, set()).add(len(drafts))
        super()._take(output, sampled)
        for name in names:
            view = self.scheduler.planner.view_of(name)
            if view is not None and name in self.histories:
                assert view.drafts == self.histories[name]
        if not self.num_ahead:
            drafts = [[7] * plan.num_draft_steps for _ in names]
            self.scheduler.update_draft_token_ids(DraftTokenIds(names, drafts))

    def _tokens(self, name: str, output: Any) -> list[int]:
        tokens = super()._tokens(name, output)
        drafts = output.scheduled_spec_decode_tokens.get(name)
        if drafts:
            self.histories[name].observe(len(drafts), len(tokens) - 1)
        return tokens


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_whoever_has_a_view_drafts_as_its_history_says(kind: str, probe_model: str) -> None:
    loop = Drafting(probe_model, LOOPS[kind][0], 0, num_blocks=200, setting=SETTING)
    assert loop.scheduler.num_lookahead_tokens == LIMIT, "drafts write behind what is scheduled"
    loop.limits["two"] = 2
    extra = {"two": {"kv_draft_tokens": 2}, "whole": {"kv_compression": "none"}}
    for number, name in enumerate(("whole", "two", "three")):
        loop.add(name, prompt(100, number), 60, extra.get(name))
    loop.run()
    assert loop.finished == {"three", "two", "whole"}
    assert loop.lengths == {"three": {1, 2, 3}, "two": {1, 2}}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_step_without_samples_teaches_nothing(kind: str, probe_model: str) -> None:
    """Nor one of a request that is gone, or whose output was dropped."""
    loop = Drafting(probe_model, LOOPS[kind][0], 0, num_blocks=200, setting=SETTING)
    loop.add("r", prompt(100), 60)
    loop.add("other", prompt(64), 60)
    while not loop.lengths.get("r"):
        loop.step()
    output = SimpleNamespace(scheduled_spec_decode_tokens={"gone": [7], "r": [7, 7], "other": [7]})
    before = loop.scheduler.planner.view_of("r").num_drafts
    for tokens in ([], [[], [9]]):
        results = ModelRunnerOutput(["r", "other"], {"r": 0, "other": 1}, tokens)
        loop.scheduler._observe_step(output, results)
        assert loop.scheduler.planner.view_of("r").num_drafts == before
    assert loop.scheduler.planner.view_of("other").num_drafts == 1


@pytest.mark.parametrize("is_at_once", [True, False])
def test_whoever_fails_drafts_no_more_and_gives_its_view_back(
    is_at_once: bool, probe_model: str
) -> None:
    """At once: in the step that takes the view, which is given back once it is there. Who is gone
    by then is not counted."""
    loop = Drafting(probe_model, LOOPS["sync"][0], 0, num_blocks=200, setting=SETTING)
    requests = [loop.add(name, prompt(100, n), 60) for n, name in enumerate(("r", "other"))]
    scheduler, failed = loop.scheduler, False
    update, schedule = scheduler.update_from_output, scheduler.schedule

    def report(output: Any, results: Any) -> Any:
        nonlocal failed
        is_due = bool(StepPlan.of(output).plans) if is_at_once else bool(loop.lengths.get("r"))
        if is_due and not failed:
            failed = True
            StepReport(drafts_failed=dict.fromkeys(("gone", "r"), "drafting")).attach(results)
        return update(output, results)

    given_up: list[str] = []

    def end() -> Any:
        output = schedule()
        given_up.extend(StepPlan.of(output).views_given_up)
        if failed and given_up and loop.histories.pop("r", None):
            assert not any(manager.views.get("r") for manager in scheduler._managers)
            loop.lengths.pop("r", None)
        return output

    scheduler.update_from_output, scheduler.schedule = report, end
    loop.run()
    assert given_up == ["r"] and "r" not in loop.lengths and loop.lengths["other"] == {1, 2, 3}
    assert scheduler.stats.failures == {"drafting": 1} and not scheduler.stats.uncompressed
    assert [each.num_output_tokens for each in requests] == [60, 60]


def test_who_is_gone_or_has_started_over_by_then_keeps_nobody_from_ending(
    probe_model: str,
) -> None:
    loop = Drafting(probe_model, LOOPS["sync"][0], 0, num_blocks=200, setting=SETTING)
    names = ("gone", "again", "r")
    requests = [loop.add(name, prompt(100, n), 60) for n, name in enumerate(names)]
    while loop.lengths.keys() != set(names):
        loop.step()
    scheduler = loop.scheduler
    scheduler._drafts_failed = list(names)
    scheduler.finish_requests("gone", RequestStatus.FINISHED_ABORTED)
    preempt(SimpleNamespace(scheduler=scheduler), requests[1])
    assert requests[2].spec_token_ids
    output = scheduler.schedule()
    assert StepPlan.of(output).views_given_up == ("r",)
    assert not requests[2].spec_token_ids and not output.scheduled_spec_decode_tokens
    assert not any(manager.views.get("r") for manager in scheduler._managers)


def test_who_has_no_view_drafts_nothing_and_cannot_fail(probe_model: str) -> None:
    """One that failed already, one that is served whole, and one whose blocks a connector reads on:
    vLLM knows it, the planner does not any more."""
    loop = Drafting(probe_model, LOOPS["sync"][0], 0, num_blocks=200, setting=SETTING)
    scheduler = loop.scheduler
    assert StepPlan.of(scheduler.schedule()).num_draft_steps == 0, "a step of nobody"
    names = ("r", "failed", "whole", "read on")
    extra = {"whole": {"kv_compression": "none"}}
    requests = {
        name: loop.add(name, prompt(100, n), 60, extra.get(name)) for n, name in enumerate(names)
    }
    while not {"r", "failed", "read on"} <= loop.lengths.keys():
        loop.step()
    scheduler._drafts_failed = ["failed"]
    read_on = requests["read on"]
    scheduler.running.remove(read_on)
    read_on.status = RequestStatus.FINISHED_STOPPED
    scheduler._free_request(read_on, delay_free_blocks=True)
    assert read_on.request_id in scheduler.requests
    assert [name for name in (*names, "gone") if scheduler._is_drafting(name)] == ["r"]
    for request in requests.values():
        request.spec_token_ids = [7]
    scheduler._clip_drafts([*names, "gone"])
    drafting = [name for name, request in requests.items() if request.spec_token_ids]
    assert drafting == ["r", "failed"], "that one's view is ended with the next step"

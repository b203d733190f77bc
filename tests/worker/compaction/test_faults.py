"""A step's compactions in which something goes wrong: for one request, and found for that one."""

import multiprocessing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.sequence import IntermediateTensors

from tests.worker.compaction.test_compactor import (
    BLOCK,
    DEVICE,
    KV,
    LENGTHS,
    WINDOW,
    World,
    packed_world,
    rows_of,
)
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import PolicyError
from vllm_kvcompress.messages import StepReport
from vllm_kvcompress.plans import CompactionPlan
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ScoreInputs
from vllm_kvcompress.worker import fault_report
from vllm_kvcompress.worker.batch import CompactionJob
from vllm_kvcompress.worker.compaction.faults import PendingFlags, StepFaults
from vllm_kvcompress.worker.fault_report import FaultReport

VICTIM = "b"


class Own(Policy):
    """Somebody's: early tokens first; does `what` to the request of 97 tokens, in one layer."""

    what: str = ""

    def score(self, inputs: ScoreInputs) -> Any:
        length = inputs.rows.num_tokens
        scores = -torch.arange(length, dtype=torch.float32, device=DEVICE).expand(KV, -1)
        if length != LENGTHS[VICTIM] or inputs.layer_index != 1:
            return scores
        if self.what == "raises":
            raise ZeroDivisionError("a policy's own bug")
        if self.what == "writes to what it is given":
            inputs.forced.zero_()
            inputs.keys.fill_(7)
            return scores
        broken = {
            "": scores,
            "one row": scores[:1],  # would be broadcast
            "too short": scores[:, :BLOCK],
            "transposed": scores.T,
            "whole numbers": scores.long(),
            "a list": scores.tolist(),
            "nothing": None,
            "another device": scores.to("meta"),
            "a NaN": scores.index_fill(1, torch.tensor([40], device=DEVICE), float("nan")),
            "a NaN behind": scores.index_fill(1, torch.tensor([96], device=DEVICE), float("nan")),
            "infinite": scores.index_fill(1, torch.tensor([40], device=DEVICE), float("inf")),
            "all equal": torch.zeros_like(scores),
            "half": scores.half(),
        }
        return broken[self.what]


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets settings that name the policy "random" have `Own` with what it does."""
    real, found = CompressionConfig.build_policy, SimpleNamespace(policy=Own())

    def build(config: CompressionConfig) -> Policy:
        return found.policy if config.policy.name == "random" else real(config)

    monkeypatch.setattr(CompressionConfig, "build_policy", build)
    return found


def jobs_of(world: World, names: str = "abc", policy: str = "random") -> list[CompactionJob]:
    config = parse_config({"policy": {"name": policy}, "budget": {"ratio": 0.5},
                           "observation_window": WINDOW, "min_prompt_len": 0})  # fmt: skip
    kept = {"a": [64, 96], "b": [32, 64], "c": [96, 64]}
    return [CompactionJob(world.plan(name, kept[name]), config, 0) for name in names]


def run(world: World, jobs: list[CompactionJob], **changes: Any) -> dict[str, str]:
    """Compact as a worker does; what is found of each request."""
    compactor = world.compactor(jobs[0].config)
    for name, value in changes.items():
        setattr(compactor, name, value)
    compactor.faults = faults = StepFaults([job.plan.request_id for job in jobs], compactor.device)
    compactor.run(jobs)
    return PendingFlags(faults.request_ids, faults.flags()).read()


def survivors(world: World, jobs: list[CompactionJob], but: str = "") -> dict:
    found = world.survivors([job.plan for job in jobs if job.plan.request_id not in but])
    assert all(rows.isfinite().all() for pair in found.values() for rows in pair)
    return found


def check_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for place, rows in one.items():
        assert all(map(torch.equal, rows, other[place])), place


BROKEN = ["raises", "one row", "too short", "transposed", "whole numbers", "a list", "nothing",
          "another device"]  # fmt: skip


@pytest.mark.parametrize("what", [*BROKEN, "a NaN"])
def test_the_others_of_the_step_are_compacted_as_without_it(own: Any, what: str) -> None:
    world = packed_world()
    assert run(world, expected := jobs_of(world)) == {}
    own.policy = Own(what=what)
    other = packed_world()
    found = run(other, jobs := jobs_of(other))
    assert found == {VICTIM: "nan_scores" if what == "a NaN" else "error"}
    check_same(survivors(other, jobs, VICTIM), survivors(world, expected, VICTIM))
    # What the step under way reads of the victim is its own tokens.
    left, right = (survivors(each, some) for each, some in ((other, jobs), (world, expected)))
    assert left.keys() == right.keys()


@pytest.mark.parametrize("what", ["infinite", "all equal", "half", "a NaN behind"])
def test_scores_that_are_in_order(own: Any, what: str) -> None:
    """A NaN of a token that may not be chosen anyway, behind the region, says nothing of it."""
    own.policy = Own(what=what)
    world = packed_world()
    assert run(world, jobs := jobs_of(world)) == {}
    keys, _, _ = rows_of(VICTIM, 1)
    kept = survivors(world, jobs)[VICTIM, 1][0]
    if what == "all equal":
        assert torch.equal(kept[:, :25], keys[:, :25]), "the earliest"
    if what == "infinite":
        assert torch.equal(kept[:, 24], keys[:, 40])
    assert torch.equal(kept[:, 25:], keys[:, 89:96]), "and the window's"


def test_what_a_policy_writes_to_forces_nothing_and_is_not_the_cache(own: Any) -> None:
    world = packed_world()
    run(world, expected := jobs_of(world))
    own.policy = Own(what="writes to what it is given")
    other = packed_world()
    assert run(other, jobs := jobs_of(other)) == {}
    check_same(survivors(other, jobs), survivors(world, expected))


def test_while_starting_it_is_raised(own: Any) -> None:
    own.policy = Own(what="one row")
    world = packed_world()
    jobs = jobs_of(world)
    message = (
        r"policy Own, layer 1: score\(\) must return a tensor of float numbers \[KV heads, tokens\]"
        r" = \(2, 97\) on cpu, got \(1, 97\) of float32 on cpu"
    )
    with pytest.raises(PolicyError, match=message):
        world.compactor(jobs[0].config).run(jobs)


@pytest.mark.parametrize("error", [RuntimeError("Triton error"), torch.OutOfMemoryError("no room")])
def test_a_kernel_that_raises_fails_those_that_it_was_launched_for(error: Exception) -> None:
    """Requests under one policy share launches. Their destinations hold zeros, not leftovers."""
    world = packed_world()
    jobs = jobs_of(world, "ab", "keydiff") + jobs_of(world, "c", "knorm")
    run(world, jobs[2:])
    expected = survivors(world, jobs[2:])
    real = world.compactor(jobs[0].config).select_tokens

    def launch(scores: torch.Tensor, *args: Any) -> torch.Tensor:
        if scores.shape[1] == 2:
            raise error
        return real(scores, *args)

    assert run(world, jobs, select_tokens=launch) == {"a": "error", "b": "error"}
    check_same(survivors(world, jobs[2:]), expected)
    assert all(not rows.any() for pair in survivors(world, jobs[:2]).values() for rows in pair)


def test_queries_that_are_missing_fail_their_request(monkeypatch: pytest.MonkeyPatch) -> None:
    world = packed_world()
    jobs = jobs_of(world, policy="snapkv")
    compactor = world.compactor(jobs[0].config)
    take = compactor.sources.window.take

    def missing(name: str, *args: Any) -> Any:
        if name == VICTIM:
            raise RuntimeError("saw 3 of 8 queries")
        return take(name, *args)

    sources = SimpleNamespace(window=SimpleNamespace(take=missing))
    assert run(world, jobs, sources=sources) == {VICTIM: "error"}
    all_missing = SimpleNamespace(window=SimpleNamespace(take=lambda *_: 1 / 0))
    assert run(world, jobs, sources=all_missing) == dict.fromkeys("abc", "error")


# --- the way to the scheduler -------------------------------------------------------------


def plan_of(name: str) -> CompactionPlan:
    return CompactionPlan(name, 100, False, 7, ())


def noted(*names: str) -> StepFaults:
    faults = StepFaults(["a", "b", "c", "a"], torch.device("cpu"))
    for name in names:
        faults.note([name], RuntimeError("no"))
    return faults


def late(report: StepReport | None = None) -> Any:
    """What vLLM returns for a step whose tokens are on their way."""
    carrier = SimpleNamespace()
    if report is not None:
        report.attach(carrier)
    return SimpleNamespace(model_runner_output=carrier, get_output=lambda: carrier)


def test_it_travels_with_what_else_is_reported() -> None:
    compactor: Any = SimpleNamespace(num_ranks=1)
    report = FaultReport(is_last_stage=True)
    assert report.begin(noted("b"), compactor, None) is None
    output = late(StepReport(seconds=(0.5,)))
    report.end(output)
    assert StepReport.of(output.model_runner_output).failed == {}, "not known before the tokens"
    found = StepReport.of(output.get_output())
    assert found.failed == {"b": "error"} and found.seconds == (0.5,)
    report.end(again := late())
    assert StepReport.of(again.get_output()).failed == {}, "once"


def test_stages_add_up() -> None:
    compactor: Any = SimpleNamespace(num_ranks=1)
    first, last = FaultReport(is_last_stage=False), FaultReport(is_last_stage=True)
    hidden = IntermediateTensors({"hidden_states": torch.ones(2)})
    sent = first.begin(noted("a"), compactor, hidden)
    assert sent.tensors.keys() > hidden.tensors.keys(), "and vLLM's own object is as it was"
    last.begin(noted("c"), compactor, None, sent)
    last.end(output := late())
    assert StepReport.of(output.get_output()).failed == {"a": "error", "c": "error"}


def test_ranks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that met nothing hears of it; one that met something alone must leave."""
    left: list[Any] = []
    monkeypatch.setattr(fault_report, "leave", lambda *said: left.append(said))
    monkeypatch.setattr(fault_report, "_failed_alike", lambda faults, sums: sums == 3)
    theirs = noted("b").flags()
    compactor: Any = SimpleNamespace(num_ranks=2, num_sums=3, all_reduce=lambda own: own + theirs)
    report = FaultReport(is_last_stage=True)
    for own in (noted(), noted("b")):
        report.begin(own, compactor, None)
        report.end(output := late())
        assert StepReport.of(output.get_output()).failed == {"b": "error"}
    assert not left
    compactor.num_sums = 4
    report.begin(noted("b"), compactor, None)
    assert len(left) == 1


def _say(rank: int, port: int, numbers: list[list[int] | None], answers: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(numbers)
    )
    group = SimpleNamespace(
        rank=rank, ranks=list(range(len(numbers))), cpu_group=torch.distributed.group.WORLD
    )
    own = numbers[rank]
    answers.put((rank, None if own is None else fault_report.alike(group, own)))
    answers.join()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([[5, 8], [5, 8]], [True, True]),
        ([[5, 8], [5, 9]], [False, False]),
        ([None, [5, 8]], [None, False]),  # on the first nothing failed: it says nothing
    ],
)
def test_ranks_ask_each_other_whether_they_are_in_step(
    monkeypatch: pytest.MonkeyPatch, numbers: list, expected: list
) -> None:
    from datetime import timedelta

    from vllm.utils.network_utils import get_open_port

    monkeypatch.setattr(fault_report, "PATIENCE", timedelta(seconds=8))
    context = multiprocessing.get_context("fork")
    answers, port = context.JoinableQueue(), get_open_port()
    processes = [
        context.Process(target=_say, args=(rank, port, numbers, answers), daemon=True)
        for rank in range(2)
    ]
    for each in processes:
        each.start()
    found = dict(answers.get(timeout=100) for _ in processes)
    for _ in processes:
        answers.task_done()
    for each in processes:
        each.join(20)
        each.kill()
    assert [found[0], found[1]] == expected

"""Compactions that go wrong on the workers, or while they are planned: nobody reads what they left.

In vLLM's own schedulers, without a model. The worker spoils what it compacts, reports that with the
step, and samples a token that nobody must hear wherever a spoiled cache is read.
"""

from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.core.test_scheduler_loop import BLOCK, LOOPS, prompt
from tests.core.told_worker import Slot, ToldWorker
from tests.core.watched_loop import UNEVEN, Watched, watch
from vllm_kvcompress.core.scheduler import logger
from vllm_kvcompress.messages import StepPlan, StepReport
from vllm_kvcompress.plans import CompactionPlan

SPOILED = 251
"""The token; others are below 201."""

AGAIN = {**UNEVEN, "trigger": "both", "interval": 32}


class SpoilingWorker(ToldWorker):
    """Fails where it is told to: what a compaction leaves of these requests is garbage."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.fails_at: dict[str, int] = {}
        self.spoiled: set[str] = set()
        self.failed: dict[str, str] = {}
        self.num_compactions: dict[str, int] = {}
        self.num_copies: dict[str, int] = {}

    def _start(self, new: Any, plan: StepPlan) -> None:
        super()._start(new, plan)
        self.spoiled.discard(new.req_id)

    def _check(self, name: str, row: Any) -> None:
        if name not in self.spoiled:
            super()._check(name, row)

    def _compact(self, plan: CompactionPlan) -> None:
        super()._compact(plan)
        name = plan.request_id
        self.num_compactions[name] = number = self.num_compactions.get(name, 0) + 1
        if plan.purpose.is_copied:
            self.num_copies[name] = self.num_copies.get(name, 0) + 1
        if self.fails_at.get(name) == number:
            for group, each in enumerate(plan.groups):
                for block in each.destination_blocks if each else ():
                    for offset in range(self.block_size):
                        self.memory[group, block, offset] = Slot(-1, SPOILED, None, False)
            self.spoiled.add(name)
            self.failed[name] = "error"


class Spoiled(Watched):
    """A loop over such a worker."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.worker: Any = SpoilingWorker(BLOCK, {}, self.random)
        update = self.scheduler.update_from_output

        def report_first(output: Any, results: Any) -> Any:
            failed, self.worker.failed = self.worker.failed, {}
            if failed:
                StepReport(failed=failed).attach(results)
            return update(output, results)

        self.scheduler.update_from_output = report_first

    def _tokens(self, name: str, output: Any) -> list[int]:
        tokens = super()._tokens(name, output)
        starts = any(new.req_id == name for new in output.scheduled_new_reqs)
        if name in self.worker.spoiled and not starts:
            tokens = [SPOILED] * len(tokens)
        self.sampled[name] = tokens
        return tokens

    def run_without_waiting_for(self, bad: Any, others: Any) -> None:
        """To the end; others start before it ends, which is served uncompressed."""
        while self.step():
            assert not bad.is_finished() or all(each.request_id in self.hits for each in others)

    def check_all_is_well(self, *requests: Any, max_tokens: int = 40) -> None:
        for request in requests:
            assert SPOILED not in request.output_token_ids, request.request_id
            ended = request.output_token_ids[-1] == 5 or request.num_output_tokens == max_tokens
            assert ended and request.request_id in self.finished
        assert not self.scheduler.compactions.reports._open


def made(probe_model: str, kind: str, num_blocks: int = 200, setting: Any = UNEVEN) -> Spoiled:
    return watch(Spoiled(probe_model, *LOOPS[kind], num_blocks, setting=setting))


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest, probe_model: str) -> Spoiled:
    return made(probe_model, request.param)


def test_it_starts_again_without_compression_and_others_go_on(loop: Spoiled) -> None:
    loop.worker.fails_at = {"bad": 1}
    requests = [loop.add(name, prompt(150, n)) for n, name in enumerate(("a", "bad", "b"))]
    loop.run()
    loop.check_all_is_well(*requests)
    assert loop.worker.begun["bad"] == (0, 0) and requests[1].num_preemptions == 1
    assert loop.worker.num_compactions == {"a": 1, "bad": 1, "b": 1}
    assert loop.stats.failures == {"error": 1} and loop.stats.uncompressed == {"failed": 1}
    assert not requests[0].num_preemptions and not requests[2].num_preemptions
    assert loop.pool.get_num_free_blocks() == loop.usable


@pytest.mark.parametrize("kind", LOOPS)
def test_a_later_compaction_of_it(probe_model: str, kind: str) -> None:
    """It has answered for a while; its answer goes on from there."""
    loop = made(probe_model, kind, setting=AGAIN)
    loop.worker.fails_at = {"bad": 2}
    request = loop.add("bad", prompt(150), 90)
    other = loop.add("a", prompt(120, 3), 90)
    loop.run()
    loop.check_all_is_well(request, other, max_tokens=90)
    assert loop.worker.num_compactions["bad"] == 2 and loop.stats.failures == {"error": 1}
    assert loop.pool.get_num_free_blocks() == loop.usable


def test_a_failure_that_arrives_after_its_end_is_only_counted(loop: Spoiled) -> None:
    loop.worker.fails_at = {"bad": 1}
    loop.add("bad", prompt(150))
    while "bad" not in loop.scheduler.compactions._planned:
        loop.step()
    loop.scheduler.finish_requests("bad", RequestStatus.FINISHED_ABORTED)
    other = loop.add("a", prompt(150, 1))
    loop.run()
    loop.check_all_is_well(other)
    assert loop.pool.get_num_free_blocks() == loop.usable


def test_nobody_begins_with_a_prefix_that_was_spoiled(loop: Spoiled) -> None:
    loop.worker.fails_at = {"r0": 1}
    shared = {"kv_shared_prefix": 128}
    requests = [
        loop.add(f"r{n}", [*prompt(128), *prompt(40, 9 * n + 1)], 40, shared) for n in range(3)
    ]
    loop.run_without_waiting_for(requests[0], requests[1:])
    loop.check_all_is_well(*requests)
    assert loop.worker.num_compactions == {"r0": 1, "r1": 1}, "the next one computes it"
    assert loop.hits["r2"] == 128 and loop.stats.shared_prefixes_kept == 1
    assert loop.stats.failures == {"error": 1}


@pytest.mark.parametrize("kind", LOOPS)
def test_no_equal_prompt_reads_survivors_that_were_spoiled(probe_model: str, kind: str) -> None:
    """One of the others makes them anew, for itself and for the rest."""
    loop = made(probe_model, kind, setting={**UNEVEN, "shared_blocks": "always"})
    loop.worker.fails_at = {"r0": 1}
    requests = [loop.add(f"r{n}", prompt(150)) for n in range(4)]
    loop.run_without_waiting_for(requests[0], requests[1:])
    loop.check_all_is_well(*requests)
    assert loop.stats.failures == {"error": 1} and loop.stats.uncompressed["failed"] == 1
    assert loop.worker.num_copies == {"r0": 1, "r1": 1}
    assert loop.pool.get_num_free_blocks() == loop.usable


def test_no_chat_goes_on_from_a_spoiled_cache(loop: Spoiled) -> None:
    loop.worker.fails_at = {"first": 1}
    text = loop.ask("first", prompt(200), 20, {"kv_session": "chat"})
    assert SPOILED not in text and not loop.stats.sessions_kept
    loop.ask("second", [*text, *prompt(50, 3)], 20, {"kv_session": "chat"})
    assert loop.stats.session_requests == {"nothing_kept": 2} and loop.stats.sessions_kept == 1


def test_one_that_the_pool_holds_only_compressed_ends_with_an_error(probe_model: str) -> None:
    """On a pool that serves it only because its prompt is compacted on the way."""
    setting = {**UNEVEN, "trigger": "all", "prompt_interval": 64, "interval": 16}
    loop = made(probe_model, "async", 32, setting)
    loop.worker.fails_at = {"long": 2}
    loop.add("long", prompt(400), 20)
    loop.run()
    assert "long" in loop.finished and loop.worker.num_compactions["long"] == 2
    assert loop.stats.failures == {"error": 1}
    other = loop.add("a", prompt(100, 3), 10)
    loop.run()
    loop.check_all_is_well(other, max_tokens=10)


@pytest.mark.parametrize("num_left", [0, 1])
def test_one_that_could_generate_no_more_token_ends_with_an_error(
    num_left: int, probe_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool holds so many more without compression. A second report finds nothing to do."""
    loop, said = made(probe_model, "sync"), list[str]()
    monkeypatch.setattr(logger, "error", lambda text, *words: said.append(text % words))
    request = loop.add("bad", prompt(150), 90)
    while request.num_output_tokens < 5:
        loop.step()

    def bound(asked: Any) -> bool:
        asked.max_tokens = 5 + num_left
        return True

    monkeypatch.setattr(loop.scheduler.longest, "bound", bound)
    for _ in range(2):
        loop.worker.failed = {"bad": "error"}
        loop.step()
    assert request.num_preemptions == 1 and loop.stats.failures == {"error": 2}
    assert loop.stats.uncompressed == {"failed": 1}
    loop.add("a", prompt(100, 3), 2)
    loop.run()
    assert request.num_output_tokens == 5 + num_left and loop.finished == {"bad", "a"}
    is_error = request.status is RequestStatus.FINISHED_ERROR
    assert is_error == (not num_left) == any("request bad ends with an error" in s for s in said)


@pytest.mark.parametrize("where", ["fit", "plan"])
def test_a_plan_that_raises_concerns_its_request_alone(loop: Spoiled, where: str) -> None:
    """In the arithmetic of lengths; and once blocks of the first layer group are taken."""
    if where == "fit":
        owner, name = loop.scheduler.planner, "fit"
        bad = lambda args: args[0].prompt_len == 151  # noqa: E731
    else:
        owner, name = loop.scheduler._managers[1], "plan"
        bad = lambda args: args[1] == "bad"  # noqa: E731
    real = getattr(owner, name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if bad(args):
            raise RuntimeError("no such lengths")
        return real(*args, **kwargs)

    setattr(owner, name, broken)
    requests = [loop.add(name, prompt(150 + n, n)) for n, name in enumerate(("a", "bad", "b"))]
    loop.run()
    loop.check_all_is_well(*requests)
    assert loop.worker.num_compactions == {"a": 1, "b": 1}
    assert loop.stats.failures == {"planning": 1} and loop.stats.uncompressed == {"failed": 1}
    assert loop.pool.get_num_free_blocks() == loop.usable

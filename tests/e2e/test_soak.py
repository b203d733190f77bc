"""A short soak of a server: what OpenAI's package gets under load is what it gets alone.

``scripts/soak.py`` is the long one. All tests share one server, and the last one ends it.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from subprocess import Popen

import pytest
from rich.console import Console

from lab.servers import free_port
from lab.soak import command, inside
from lab.soak.client import Client
from lab.soak.ending import terminate
from lab.soak.findings import Report, hold_against_stock
from lab.soak.processes import Watch
from lab.soak.questions import FATES, KINDS, LOSSLESS, Questions, Request, draw_requests
from lab.soak.run import Soak
from lab.soak.settings import SETTINGS
from tests import forked
from vllm_kvcompress.evaluation.replay import Replay

pytestmark = pytest.mark.engine

SEED, NUM_QUESTIONS, MAX_OUTPUT = 75, 10, 18
SHUTDOWN_TIMEOUT = 100
DRAIN = [command.SHUTDOWN_TIMEOUT, str(SHUTDOWN_TIMEOUT)]
NUM_REQUESTS, NUM_AT_THE_END, NUM_AT_ONCE = 40, 8, 12
PRESETS = ["keydiff", "windowkv"]


@dataclass
class Running:
    """A server, and one event loop for all that asks it."""

    process: Popen[bytes]
    soak: Soak
    requests: list[Request]
    runner: asyncio.Runner


@pytest.fixture(scope="module")
def running(probe_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder, port = tmp_path_factory.mktemp("soak"), free_port()
    url = f"http://127.0.0.1:{port}"
    words = command.server_command(probe_model, port, DRAIN, SETTINGS["both"].flags)
    log, console = folder / "server.log", Console()
    environment = forked.plugin(folder / "plugin", inside.environment(folder))
    with (
        command.started(words, environment, log, url, console) as process,
        asyncio.Runner() as runner,
    ):
        client = Client(url, command.NAME)
        report = Report(seed=SEED)
        soak = Soak(client, Watch(process.pid), folder, report, lambda *_: None, NUM_AT_ONCE)
        questions = Questions(SEED, PRESETS, MAX_OUTPUT).draw(NUM_QUESTIONS)
        runner.run(soak.alone(questions))
        requests = draw_requests(SEED, questions, NUM_REQUESTS + NUM_AT_THE_END)
        yield Running(process, soak, requests, runner)
        runner.run(client.close())


def test_under_load_everything_is_as_alone(running: Running) -> None:
    """Tokens, finish reasons, counts; then no block, no name, no kept cache is left."""
    soak, report = running.soak, running.soak.report
    running.runner.run(soak.load(running.requests[:NUM_REQUESTS]))
    assert not report.failures, report.failures
    assert report.fates.keys() == FATES.keys() and report.questions.keys() == KINDS.keys()
    assert report.outcomes.keys() == {"finished", "left", "refused"}
    assert sum(report.outcomes.values()) == NUM_REQUESTS + report.fates["conversation"]
    assert report.answers_compared >= 30 and report.distinct_answers >= NUM_QUESTIONS - 1
    counted = report.counted
    assert counted["requests compressed"] >= 10
    assert report.policies.keys() >= {"snapkv", *PRESETS}
    assert [each["requests"] for each in report.memory][-1] == NUM_REQUESTS


def test_what_is_lossless_is_what_transformers_says(running: Running, probe_model: str) -> None:
    soak, replay = running.soak, Replay(probe_model)
    questions = list(soak.questions.values())
    stock = {
        each.name: [replay.generate(replay.prefill(each.prompt), None, each.max_tokens)]
        for each in questions
        if each.kind in (*LOSSLESS, "preset", "budget")
    }
    report = Report()
    hold_against_stock(report, questions, soak.references, stock)
    assert not report.failures and report.equal_to_stock == report.lossless_compared >= 2
    assert report.changed_by_compression >= 1, "equality shows little"


def test_a_wrong_token_would_be_noticed(running: Running) -> None:
    """The same request, held against a reference with one token changed."""
    soak, report = running.soak, Report()
    (name, question), *_ = soak.questions.items()
    tokens = [list(each) for each in soak.references[name].tokens]
    tokens[0][-1] += 1
    faulty = replace(
        soak, report=report, references={name: replace(soak.references[name], tokens=tokens)}
    )
    request = Request(0, name, stream=True, max_tokens=question.max_tokens)
    running.runner.run(faulty._check(request))
    assert [each["what"] for each in report.failures] == ["answer"]
    assert f"differs from token {question.max_tokens - 1} on" in report.failures[0]["detail"]


def test_sigterm_under_load(running: Running) -> None:
    """Answers that are under way are given, the server ends, nothing lives on. Runs last."""
    report = running.soak.report = Report()
    rest = running.requests[NUM_REQUESTS:]
    running.runner.run(terminate(running.soak, running.process, rest, SHUTDOWN_TIMEOUT))
    assert not report.failures, report.failures
    assert running.process.returncode == 0
    assert {"API server", "VLLM::EngineCore", "VLLM::Worker"} <= set(
        report.ending["processes before"]
    )
    assert report.ending["shared files seen"] > 0 == report.ending["shared files left"]
    # Whoever came too late is told so.
    assert report.ending["clients"]["finished"] >= NUM_AT_THE_END // 2 - 1

"""The checks of scripts/soak.py see what is wrong; tests/e2e/test_soak.py runs a server."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lab.load_checks import named_in, sizes
from lab.soak import checks, inside
from lab.soak.checks import Reference
from lab.soak.client import Answer, by_label, total
from lab.soak.command import parse_args
from lab.soak.findings import Report, hold_against_stock
from lab.soak.processes import Reading, Watch, shared_memory, tree
from lab.soak.questions import (
    CROWD,
    FATES,
    KINDS,
    MAX_PROMPT,
    Question,
    Questions,
    Request,
    draw_requests,
)
from lab.soak.report import as_json, rows
from lab.soak.settings import SETTINGS
from vllm_kvcompress.config.reading import parse_config

PRESETS = ["keydiff", "snapkv", "tova"]
REFERENCE = Reference([[7, 8, 9, 7, 6]])
ASKED = Request(1, "q", max_tokens=4)
GOOD = Answer(tokens=[[7, 8, 9, 7]], reasons=["length"], num_counted=4)


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return Questions(0, PRESETS).draw(100)


# --- what is drawn ------------------------------------------------------------------------


def test_a_seed_stands_for_one_course(questions: list[Question]) -> None:
    assert Questions(0, PRESETS).draw(100) == questions != Questions(1, PRESETS).draw(100)
    requests = draw_requests(0, questions, 300)
    assert draw_requests(0, questions, 300) == requests != draw_requests(1, questions, 300)
    assert draw_requests(0, questions, 200) == requests[:200]


def test_everything_is_drawn(questions: list[Question]) -> None:
    assert {each.kind for each in questions} == KINDS.keys()
    assert {each.kind for each in Questions(0, PRESETS).draw(9)} == KINDS.keys()
    assert {each.xargs.get("kv_compression") for each in questions} >= {*PRESETS, "none"}
    requests = draw_requests(0, questions, 2000)
    assert {each.fate for each in requests} == FATES.keys()
    assert {each.question for each in requests} == {each.name for each in questions}
    assert {each.stream for each in requests} == {True, False}
    assert len({each.priority for each in requests}) > 3
    assert any(each.stop_at is not None for each in requests)
    most = {each.name: each.max_tokens for each in questions}
    assert all(1 <= each.max_tokens <= most[each.question] for each in requests)
    kinds = {each.name: each.kind for each in questions}
    crowd = [each for each in requests if each.number % 100 in CROWD]
    assert {kinds[each.question] for each in crowd} == {"crowd"} and len(crowd) == 240
    assert len({each.extra["cache_salt"] for each in crowd}) == 240


def test_prompts_fit_and_have_no_token_twice(questions: list[Question]) -> None:
    for question in questions:
        prompts = question.prompt if question.kind == "batch" else [question.prompt]
        for prompt in prompts if not question.is_chat else []:
            assert len(prompt) == len(set(prompt)) <= MAX_PROMPT
            assert not set(prompt) & set(question.more)


# --- answers ------------------------------------------------------------------------------


def test_a_right_answer() -> None:
    assert checks.wrong_answer(ASKED, REFERENCE, GOOD) == ""
    left = replace(ASKED, fate="disconnect")
    assert not checks.wrong_answer(left, REFERENCE, Answer("left", [[7, 8]], [None]))
    assert not checks.wrong_answer(replace(ASKED, fate="cancel"), REFERENCE, Answer("left"))
    stop = replace(ASKED, stop_at=2)
    assert checks.stop_token(stop, REFERENCE) == [9]
    stopped = Answer(tokens=[[7, 8, 9]], reasons=["stop"], num_counted=3)
    assert not checks.wrong_answer(stop, REFERENCE, stopped)
    refused = replace(ASKED, fate="refused")
    assert not checks.wrong_answer(refused, REFERENCE, Answer("refused", error="HTTP 400"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": [[7, 8, 5, 7]]}, "differs from token 2 on: [5, 7], expected [9, 7]"),
        ({"tokens": [[7, 8, 9]]}, "differs from token 3 on"),
        ({"tokens": [[7, 8, 9, 7, 6]]}, "differs from token 4 on"),
        ({"tokens": [[7, 8, 9, 7], [7]], "reasons": ["length", None]}, "2 choices, expected 1"),
        ({"tokens": [], "reasons": []}, "0 choices, expected 1"),
        ({"reasons": ["stop"]}, "ended by stop, expected length"),
        ({"num_counted": 5}, "4 tokens, but usage says 5"),
        ({"outcome": "cut", "error": "closed"}, "cut: closed"),
        ({"outcome": "hung"}, "hung"),
        ({"outcome": "error", "error": "HTTP 500"}, "HTTP 500"),
        ({"outcome": "refused", "error": "HTTP 400: no"}, "refused: HTTP 400"),
        ({"outcome": "left", "tokens": [[7, 5]]}, "differs from token 1 on"),
    ],
)
def test_a_wrong_answer(change: dict[str, Any], words: str) -> None:
    assert words in checks.wrong_answer(ASKED, REFERENCE, replace(GOOD, **change))


def test_what_must_be_refused_and_is_not() -> None:
    wrong = checks.wrong_answer(replace(ASKED, fate="refused"), REFERENCE, GOOD)
    assert wrong == "should have been refused, but: finished"


def test_a_second_turn_goes_on_or_starts_anew() -> None:
    reference = replace(REFERENCE, second_turns=[[1, 2], [1, 3]])
    for tokens in reference.second_turns:
        assert not checks.wrong_second_turn(reference, Answer(tokens=[tokens]))
    wrong = checks.wrong_second_turn(reference, Answer(tokens=[[1, 4]]))
    assert "gone on, differs from token 1" in wrong and "anew, differs from token 1" in wrong
    assert "cut" in checks.wrong_second_turn(reference, Answer("cut"))


def test_stock_counts() -> None:
    """Lossless answers must be stock's; of others it is counted."""
    asked = [Question("a", "lossless", [5], 5), Question("b", "preset", [5], 5)]
    references = {"a": REFERENCE, "b": REFERENCE}
    report = Report()
    hold_against_stock(report, asked, references, {"a": [[7, 8, 9, 7, 6]], "b": [[7, 7]]})
    assert (report.equal_to_stock, report.changed_by_compression, report.failures) == (1, 1, [])
    hold_against_stock(report, asked, references, {"a": [[7, 8, 9, 7, 5]]})
    assert report.equal_to_stock == 1 and report.lossless_compared == 2
    assert report.failures[0]["what"] == "not stock's"
    assert "differs from token 4" in report.failures[0]["detail"]


# --- memory, books, processes -------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"rss_mib": 1040.0}, None),
        ({"rss_mib": 1050.0}, "grew from 1000 to 1050 MiB; 44 MiB are allowed"),
        ({"num_files": 60}, "60 open files"),
        ({"num_threads": 20}, "20 threads"),
        ({"pid": 2}, "is gone"),
    ],
)
def test_growth(change: dict[str, Any], words: str | None) -> None:
    before = Reading(1, "VLLM::EngineCore", 1000.0, 40, 10)
    wrong = checks.growth([before], [replace(before, **change)])
    assert wrong == [] if words is None else words in " ".join(wrong)


def test_containers_that_grow() -> None:
    before = {"core: planner.requests": 3}
    assert not checks.grown_containers(before, {"core: planner.requests": 60})
    (wrong,) = checks.grown_containers(before, {"core: planner.requests": 70, "new": 2})
    assert wrong == "core: planner.requests has 70 entries; it had 3"


def test_processes_that_live_on_are_found(tmp_path: Path) -> None:
    """A child in a session of its own, and a shared file that it has open."""
    shared = Path("/dev/shm") / f"kvcompress-test-{tmp_path.name}-{time.monotonic_ns()}"
    code = (
        "import subprocess, sys, time\n"
        f"file = open({str(shared)!r}, 'w')\n"
        "subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "print('ready', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        watch = Watch(parent.pid)
        watch.look()
        assert shared_memory(tree(parent.pid)) == {str(shared)} == watch.files
        parent.kill()
    try:
        (orphan,) = watch.orphans(patience=0.2)
        assert "sleep" in watch.names[orphan.pid]
        assert watch.files_left() == [str(shared)]
        orphan.kill()
        assert watch.orphans() == []
    finally:
        shared.unlink()
    assert watch.files_left() == []


def test_names_that_are_left_are_found() -> None:
    roots = {
        "rows": {"cmpl-1-0": 3},
        "waiting": [("a", {"chatcmpl-2"})],
        "known": {"snapkv": [1, 2]},
    }
    assert named_in(roots, inside.is_request) == ["rows (key)", "waiting"]
    assert sizes(roots) == {"rows": 1, "waiting": 4, "known": 3}


class Core:
    """An engine whose pool has lost a block, and whose worker remembers a request."""

    def __init__(self, references: int, rows: dict[str, int], emptied: bool = True) -> None:
        block = SimpleNamespace(block_id=1, is_null=False, ref_cnt=references)
        pool = SimpleNamespace(
            blocks=[block], num_gpu_blocks=2, get_num_free_blocks=lambda: 1 - references
        )
        self.scheduler = SimpleNamespace(
            _managers=[], requests={}, check_integrity=lambda: None,
            reset_prefix_cache=lambda: emptied, kv_cache_manager=SimpleNamespace(block_pool=pool),
            reuse=SimpleNamespace(kept=SimpleNamespace(held_blocks=list)),
        )  # fmt: skip
        state = SimpleNamespace(req_id_to_index=rows)
        runner = SimpleNamespace(model_state=None, compactor=None, req_states=state)
        worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
        self.model_executor = SimpleNamespace(collective_rpc=lambda do: [do(worker)])

    def reset_prefix_cache(self) -> bool:
        return self.scheduler.reset_prefix_cache()


@pytest.mark.parametrize(
    ("core", "words"),
    [
        (Core(0, {}), ""),
        (Core(1, {}), "block 1 has 1 references and 0 holders"),
        (Core(0, {}, emptied=False), "the prefix cache cannot be emptied"),
        (Core(0, {"cmpl-1-0": 4}), "worker 0: requests that are gone are still named in ['rows"),
    ],
)
def test_books_are_shown_where_they_are_asked_for(
    core: Core, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(inside.FOLDER, str(tmp_path))
    reset = inside._with_books(Core.reset_prefix_cache)
    reset(core)
    assert inside.books_of(tmp_path) is None
    (tmp_path / inside.ASK).touch()
    reset(core)
    found = inside.books_of(tmp_path)
    assert found is not None and words in found["wrong"] and bool(words) == bool(found["wrong"])
    assert found["sizes"]["worker 0: rows"] == ("rows" in words)


def test_ids_of_requests_over_http() -> None:
    assert inside.is_request("cmpl-8d1f-0-93ab") and inside.is_request("chatcmpl-8d1f-93ab")
    assert not inside.is_request("snapkv")


# --- metrics, report, command line --------------------------------------------------------

METRICS = """# HELP a:b_total text
a:b_total{policy="snapkv",engine="0"} 3.0
a:b_total{policy="tova",engine="0"} 0.0
a:b_total{policy="snapkv",engine="1"} 1.0
a:b_total_more{policy="snapkv"} 9.0
"""


def test_metrics() -> None:
    assert total(METRICS, "a:b_total") == 4
    assert total(METRICS, "a:b_total", engine="1") == 1
    assert by_label(METRICS, "a:b_total", "policy") == {"snapkv": 4}


def test_the_table_has_failures_and_memory() -> None:
    reading = Reading(1, "VLLM::EngineCore", 1000.0, 40, 10).as_json()
    memory = [{"requests": n, "processes": [reading]} for n in (2, 8)]
    report = Report(memory=memory, asked=9, fates={"finish": 8})
    report.fail("answer", "differs")
    lines = dict(rows(report))
    assert lines["VLLM::EngineCore"].startswith("1000 MiB at 2 requests, 1000 at the end")
    assert lines["failures"] == "answer 1" and lines["requests"].startswith("8 of 9: finish 8")
    assert as_json(report)["passed"] is False


def test_flags_of_the_server_follow_two_dashes() -> None:
    args = parse_args(["--requests", "40", "--", "--max-num-seqs", "4"])
    assert args.requests == 40 and args.server_args == ["--max-num-seqs", "4"]
    assert args.command == "python scripts/soak.py --requests 40 -- --max-num-seqs 4"
    with pytest.raises(SystemExit):
        parse_args(["--requests", "0"])


# --- settings -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_one_that_a_server_takes(name: str) -> None:
    setting = SETTINGS[name]
    assert parse_config({"preset": "snapkv", **setting.config}) is not None
    drawn = {each.kind for each in Questions(0, PRESETS).draw(60, setting.without)}
    assert drawn == KINDS.keys() - set(setting.without)


def test_where_the_load_decides_the_length_is_certain() -> None:
    others = Answer(tokens=[[1, 2, 3, 4]], reasons=["length"], num_counted=4)
    few = replace(others, tokens=[[1, 2]], num_counted=2)
    assert checks.wrong_answer(ASKED, REFERENCE, others)
    assert not checks.wrong_answer(ASKED, checks.any_tokens(REFERENCE, others), others)
    assert checks.wrong_answer(ASKED, checks.any_tokens(REFERENCE, few), few)
    none = Answer(tokens=[], reasons=[], num_counted=0)
    assert checks.wrong_answer(ASKED, checks.any_tokens(REFERENCE, none), none)


def test_in_a_lossless_setting_all_answers_are_stocks() -> None:
    report, question = Report(), Question("q", "server", [1], 5)
    stock = {"q": [[7, 8, 9, 7, 5]]}
    hold_against_stock(report, [question], {"q": REFERENCE}, stock)
    assert not report.failures and report.changed_by_compression == 1
    hold_against_stock(report, [question], {"q": REFERENCE}, stock, is_lossless=True)
    assert [each["what"] for each in report.failures] == ["not stock's"]

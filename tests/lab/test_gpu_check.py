"""scripts/gpu_check.py: a failing stage hides nothing, limits are kept, a rehearsal says so."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from lab.gpu_check import command as script
from lab.gpu_check import engines
from lab.gpu_check.engine_case import CASES, MODEL_CASES
from lab.gpu_check.engines import (
    Comparison,
    agreement,
    comparisons,
    compressed,
    reason,
)
from lab.gpu_check.report import REHEARSAL, table
from lab.gpu_check.runner import (
    FAILED,
    PASSED,
    SKIPPED,
    TIMED_OUT,
    Stage,
    run_stages,
)
from lab.gpu_check.stages import Options, equality, junit, make_stages

ROOT = Path(__file__).parents[2]
ABOUT = {"rehearsal": True, "device": "cpu", "commit": "abc", "versions": {}}


def stage(name: str, code: str, limit: float = 60, **rest: Any) -> Stage:
    return Stage(name, name, [sys.executable, "-c", code, "{out}"], name, limit, **rest)


GOOD = "import sys, pathlib; pathlib.Path(sys.argv[1], 'said').write_text('fine')"
RAISES = "raise ValueError('no such kernel')"
# A grandchild in a session of its own, as a server is; its number is written for the test.
HANGS = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(sleep, start_new_session=True)
pathlib.Path(sys.argv[1], "child").write_text(str(child.pid))
time.sleep(600)
"""


def said(folder: Path) -> str:
    return (folder / "said").read_text()


# --- the runner ---------------------------------------------------------------------------


def test_no_stage_hides_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.gpu_check.runner.GRACE", 1.0)
    lines: list[str] = []
    stages = [
        stage("raises", RAISES, summary=said),
        stage("hangs", HANGS, limit=5),
        Stage("missing", "missing", ["/no/such/program"], "missing", 60),
        stage("good", GOOD, summary=said),
    ]
    start = time.monotonic()
    outcomes = run_stages(stages, tmp_path, ABOUT, tell=lines.append)
    assert time.monotonic() - start < 40
    assert [each.status for each in outcomes] == [FAILED, TIMED_OUT, FAILED, PASSED]
    assert outcomes[0].summary == "exit code 1. ValueError: no such kernel"
    assert outcomes[1].summary.startswith("stopped after 5 s") and 5 <= outcomes[1].seconds < 20
    assert "No such file" in outcomes[2].summary
    assert outcomes[3].summary == "fine"
    child = int((tmp_path / "hangs" / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    for each in outcomes:
        written = json.loads((tmp_path / f"{each.stage}.json").read_text())
        assert written["status"] == each.status and written["about"]["rehearsal"] is True
    text = table(outcomes, ABOUT)
    assert text.startswith(REHEARSAL) and "no such kernel" in text and "timed out" in text


def test_a_result_is_written_before_the_next_stage_begins(tmp_path: Path) -> None:
    sees = "import sys, pathlib; assert (pathlib.Path(sys.argv[1]).parent / 'first.json').exists()"
    outcomes = run_stages([stage("first", RAISES), stage("second", sees)], tmp_path, ABOUT)
    assert [each.status for each in outcomes] == [FAILED, PASSED]


def test_resume_repeats_what_did_not_pass_and_keeps_what_it_left(tmp_path: Path) -> None:
    """The benchmarks refuse a folder that exists: a second try once failed for that alone."""
    makes = "import sys, pathlib; pathlib.Path(sys.argv[1], 'results').mkdir(); sys.exit({code})"
    run_stages([stage("good", GOOD), stage("bench", makes.format(code=1))], tmp_path, ABOUT)
    again = [stage("good", RAISES), stage("bench", makes.format(code=0))]
    assert [each.status for each in run_stages(again, tmp_path, ABOUT, resume=True)] == [PASSED] * 2
    assert json.loads((tmp_path / "bench.1" / "outcome.json").read_text())["status"] == FAILED
    assert (tmp_path / "bench.1" / "results").is_dir()
    assert [each.status for each in run_stages(again, tmp_path, ABOUT)] == [FAILED, PASSED]
    assert (tmp_path / "bench.2").is_dir()


def test_what_no_time_is_left_for_is_not_run(tmp_path: Path) -> None:
    (outcome,) = run_stages([stage("good", GOOD)], tmp_path, ABOUT, total=5)
    assert outcome.status == SKIPPED and not (tmp_path / "good").exists()
    assert json.loads((tmp_path / "good.json").read_text())["status"] == SKIPPED


# --- what stages say ----------------------------------------------------------------------


def test_agreement_is_exact_or_of_the_first_tokens() -> None:
    late = [list(range(20)), [*range(19), 99]]
    assert not agreement([late], exact=True)["ok"]
    found = agreement([late], exact=False)
    assert found == {"ok": True, "tokens": 20, "equal": 19, "first_tokens_share": 1.0}
    early = [list(range(20)), [99, *range(1, 20)]]
    assert not agreement([early], exact=False)["ok"], "7 of 8"
    assert agreement([late[:1] * 2], exact=True)["ok"]


def test_a_comparison_needs_both_engines_and_takes_its_labels() -> None:
    comparison = Comparison("t", "evict", "stock", ("none",))
    found = {"stock": {"tokens": {"none": [1], "none together": [2], "server": [3]}}}
    assert comparison.judge(found, ["evict"], True)["ok"] is False
    not_run = comparison.judge(found, [], True)
    assert (not_run["ok"], not_run["why"]) == (None, "not run")
    found["evict"] = {"tokens": {"none": [1], "none together": [2], "server": [4]}}
    assert comparison.judge(found, [], True)["ok"]
    assert not Comparison("t", "evict", "stock").judge(found, [], True)["ok"]
    found["evict"]["tokens"]["none together"] = [9]
    assert not comparison.judge(found, [], True)["ok"]


def test_every_case_is_compared_on_a_gpu() -> None:
    compared = {each.case for each in comparisons(rehearse=False)}
    assert compared == set(CASES) - {"stock"}


def test_an_engine_that_did_nothing_is_found() -> None:
    assert not compressed({"kind": "evict", "counts": {"kv_compression_uncompressed_requests": 4}})
    assert compressed({"kind": "evict", "counts": {"kv_compression_requests/snapkv": 1}})
    assert not compressed({"kind": "draft", "counts": {"kv_compression_requests/snapkv": 1}})


def test_models_are_compared_or_skipped_with_a_reason(tmp_path: Path, monkeypatch) -> None:
    """A kind that cannot run here hides no other; one that fails is no pass."""
    ran: list[str] = []

    def run_case(name: str, args: Any, environment: Any) -> dict[str, Any] | str:
        ran.append(name)
        if name == "recurrent-evict":
            return "ValueError: no such layer"
        kind, counts = MODEL_CASES[name].kind, {"kv_compression_requests/snapkv": 1}
        return {"kind": kind, "tokens": {"none": [1], "ratio 1.0": [2]}, "counts": counts}

    monkeypatch.setattr(engines, "run_case", run_case)
    why = {"fp8": "no such instructions"}
    monkeypatch.setattr(engines, "cannot_run", why.get)
    args = argparse.Namespace(rehearse=True, dtype="float32", out=tmp_path, model=None)
    assert not engines.models(args)
    assert set(ran) == {
        f"{model}-{kind}"
        for model in ("windowed", "latent", "recurrent") for kind in ("stock", "evict")
    }  # fmt: skip
    found = json.loads((tmp_path / "equality.json").read_text())
    assert found["skipped"] == why and found["failed"].keys() == {"recurrent-evict"}
    assert [each["ok"] for each in found["comparisons"]] == [True, True, False]
    assert (tmp_path / "models" / "latent" / "model.safetensors").exists()
    words = equality(tmp_path)
    assert words.startswith("2 of 3 comparisons hold") and "fp8 skipped: no such" in words
    args.rehearse = False
    why.clear()
    engines.models(args)
    assert set(ran) == MODEL_CASES.keys()


def test_the_reason_names_the_error_and_our_file() -> None:
    log = (
        'File "/x/vllm_kvcompress/worker/compactor.py", line 125, in _best_blocks\n'
        "RuntimeError: GPU<->CPU sync detected\n"
    )
    assert reason(log) == (
        'RuntimeError: GPU<->CPU sync detected (at worker/compactor.py", line 125, in _best_blocks)'
    )
    assert reason("") == "no output"


def test_junit_counts(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(
        '<testsuites><testsuite tests="4" failures="1" errors="0" skipped="1">'
        '<testcase name="a"/><testcase name="b"><failure/></testcase>'
        '<testcase name="c"><skipped/></testcase><testcase name="d"/></testsuite></testsuites>'
    )
    assert junit(tmp_path) == "2 passed, 1 failures, 1 skipped; b"


# --- the script ---------------------------------------------------------------------------


def test_stages_are_in_order_of_worth_and_show_no_path(tmp_path: Path) -> None:
    names = [each.name for each in make_stages(Options(ROOT, rehearse=False))]
    assert names == [
        "machine", "kernels", "equality", "equality-bf16", "models", "gpu-tests", "sync",
        "bench-kernels", "bench-serving", "bench-speculation",
    ]  # fmt: skip
    for each in make_stages(Options(ROOT, rehearse=False, no_compile=True)):
        assert str(ROOT) not in each.shown and sys.executable not in each.shown


def test_without_a_gpu_only_a_rehearsal_runs(capsys: pytest.CaptureFixture[str]) -> None:
    if script.has_gpu():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        script.main([])
    assert "--rehearse" in capsys.readouterr().err


def test_an_unknown_stage_and_old_results_are_refused(tmp_path: Path, capsys) -> None:
    assert script.main(["--rehearse", "--out", str(tmp_path / "new"), "--stages", "kernel"]) == 1
    assert "there is no 'kernel'; allowed are machine, kernels" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert script.main(["--rehearse", "--out", str(tmp_path)]) == 1
    assert "has results; give --resume" in capsys.readouterr().err


def test_a_rehearsal_of_the_quick_stages(tmp_path: Path, monkeypatch, capsys) -> None:
    """Real ones around two that raise and hang; everything is marked as no GPU result."""
    real = make_stages

    def with_bad_ones(options: Options) -> list[Stage]:
        stages = {each.name: each for each in real(options)}
        hangs = stage("hangs", "import time; time.sleep(600)", limit=3)
        return [stage("raises", RAISES), stages["machine"], hangs, stages["gpu-tests"]]

    monkeypatch.setattr(script, "make_stages", with_bad_ones)
    out = tmp_path / "out"
    assert script.main(["--rehearse", "--out", str(out)]) == 1
    summary = json.loads((out / "summary.json").read_text())
    assert summary["kind"] == REHEARSAL
    statuses = {"raises": FAILED, "machine": PASSED, "hangs": TIMED_OUT, "gpu-tests": PASSED}
    assert summary["status"] == statuses
    machine = json.loads((out / "machine.json").read_text())
    assert machine["summary"].startswith("cpu, torch ")
    assert machine["command"].startswith("python -m lab.gpu_check.machine")
    assert "skipped" in json.loads((out / "gpu-tests.json").read_text())["summary"]
    page = (out / "README.md").read_text()
    assert f"**{REHEARSAL}.**" in page and "no such kernel" in page and str(ROOT) not in page
    assert REHEARSAL in capsys.readouterr().out

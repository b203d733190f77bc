"""`kvcompress plan --speed`: what it prints and refuses; the computed page of the documentation."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vllm_kvcompress.cli.common import PIPE_WIDTH
from vllm_kvcompress.cli.main import main

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "lab" / "performance_tables.py"
Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], probe_model: str) -> Plan:
    """Call `kvcompress plan`; return its status, output and error output."""

    def call(*options: str, preset: str = "streaming_llm", output: int = 128) -> Any:
        arguments = ["plan", "--prompt-len", "8000", "--output-len", str(output)]
        arguments += ["--kv-compression", preset, "--model", probe_model]
        status = main([*arguments, *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


RATES = ("--speed", "--bandwidth", "1GB/s", "--flops", "1PFLOP/s", "--launch-us", "0")


def test_compactions_inside_prompts_are_not_modelled(plan: Plan) -> None:
    inside = ("--kv-compression-config", '{"trigger": "prompt"}')
    status, out, err = plan(*RATES, *inside)
    assert status == 1 and not out and "--speed: times of compactions inside the prompt" in err
    assert plan(*inside)[0] == 0


def test_in_numbers(plan: Plan, probe_model: str) -> None:
    """Time is bytes: a token's cache is 4 * 2 * 2 * 64 * 2 = 2,048; 960 of 8,000 stay."""
    options = ("--json", "--batch", "2,3", "--accepted", "2.5", "--kv-cache-memory", "64MiB")
    status, out, err = plan(*RATES, *options)
    assert (status, err) == (0, "")
    found = json.loads(out)["speed"]
    assert found["computed"] is True and len(found["left_out"]) == 5
    assert found["machine"]["source"] == "bandwidth, FLOP/s given"
    assert found["machine"]["link_bandwidth"] is None
    config = json.loads((Path(probe_model) / "config.json").read_text())
    layer = 2 * config["hidden_size"] * 64 * (config["num_attention_heads"] + 2)
    layer += 3 * config["hidden_size"] * config["intermediate_size"]
    weights = 2 * (4 * layer + config["vocab_size"] * config["hidden_size"])
    two, three = found["batches"]
    assert (two["batch"], three["batch"]) == (2, 3)
    assert two["without"]["bytes_read"] == weights + 2 * 8064 * 2048
    assert two["with"]["bytes_read"] == weights + 2 * 1024 * 2048
    assert two["without"]["seconds"] == pytest.approx((weights + 2 * 8065 * 2048) / 1e9)
    assert two["gain"] == pytest.approx(two["without"]["seconds"] / two["with"]["seconds"])
    draft, step = two["draft"], two["draft"]["draft_step"]["seconds"]
    paid = (4 * step + draft["verify_pass"]["seconds"]) / two["without"]["seconds"]
    assert draft["num_drafts"] == 4 and draft["accepted_to_pay"] == pytest.approx(paid)
    assert draft["speed_up"] == pytest.approx(2.5 / paid)
    copy = next(s for s in found["compaction"]["stages"] if s["name"] == "copy")
    assert copy["written"] == 960 * 2048
    assert found["capture"]["stages"] == [], "the policy reads no queries"
    assert found["prefill"]["flops"] > 2 * 4 * layer * 8000
    # 64 MiB are 2,048 blocks of 32 KiB, of which stock takes 508 a request.
    assert found["throughput"]["without"]["batch"] == 4
    assert found["throughput"]["draft"]["batch"] == 2047 // (508 + 60 + 1)


def test_for_people(plan: Plan) -> None:
    options = ("--speed", "--machine", "h200", "--kv-cache-memory", "1GiB", "--accepted", "3.5")
    status, out, err = plan(*options, preset="snapkv")
    assert (status, err) == (0, "")
    assert "Times, COMPUTED and not measured, on 4,800 GB/s, 989 TFLOP/s" in out
    assert "(NVIDIA's data sheet of the H200 SXM; 5 us per launch assumed)" in out
    for word in ("prefill", "queries", "score", "policy", "select", "copy", "compression"):
        assert f"\n {word} " in out
    assert "draft mode at 3.5 a step" in out and "with compression" in out
    assert "Left out: activations" in out
    assert all(len(line) <= PIPE_WIDTH for line in out.splitlines())
    batches = [line.split()[0] for line in out.splitlines() if line.count(" x") > 1]
    assert batches == ["1", "32", "256"]


def test_without_speed_nothing_changes(plan: Plan) -> None:
    out = plan()[1]
    assert "COMPUTED" not in out and "speed" not in json.loads(plan("--json")[1])


def test_draft_mode_and_interval_show_what_they_have(plan: Plan) -> None:
    draft = ("--kv-compression-config", '{"mode": "draft"}')
    found = json.loads(plan(*RATES, *draft, "--json")[1])["speed"]["batches"][0]
    assert found.keys() == {"batch", "without", "draft"}
    out = plan(*RATES, *draft)[1]
    assert "4 drafts: GB" in out and "pays after" not in out
    interval = ("--kv-compression-config", '{"trigger": "interval", "interval": 64}')
    found = json.loads(plan(*RATES, *interval, "--json")[1])["speed"]["batches"][0]
    assert found.keys() == {"batch", "without", "with", "gain", "tokens_to_pay"}
    assert "4 drafts: GB" not in plan(*RATES, *interval)[1]


@pytest.mark.parametrize(
    ("options", "output", "words"),
    [
        (["--tensor-parallel-size", "2"], 128, ["sums of activations", "--link-bandwidth"]),
        ([], 0, ["--output-len is 0"]),
    ],
)
def test_warnings(plan: Plan, options: list[str], output: int, words: list[str]) -> None:
    status, out, err = plan(*RATES, *options, output=output)
    assert status == 0 and "COMPUTED" in out
    assert err.startswith("kvcompress: warning: ") and err.count("\n") == 1
    assert all(word in err for word in words)


def test_ranks_take_a_link(plan: Plan) -> None:
    options = (*RATES, "--json", "--tensor-parallel-size", "2", "--link-bandwidth", "1GB/s")
    status, out, err = plan(*options)
    assert (status, err) == (0, "")
    found = json.loads(out)["speed"]["batches"][0]["without"]
    moved = found["bytes_read"] + found["bytes_written"] + found["stages"][0]["link_bytes"]
    assert found["stages"][0]["link_bytes"] > 0
    assert found["seconds"] == pytest.approx(moved / 1e9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--speed"],
            ["the bandwidth of the GPU is missing", "--machine (a100, h100, h200, b200)"],
        ),
        (["--speed", "--bandwidth", "1TB/s"], ["the FLOP/s of the GPU is missing"]),
        (["--machine", "h100"], ["--machine: goes with --speed only"]),
        (["--launch-us", "5"], ["--launch-us: goes with --speed only"]),
        (["--batch", "1"], ["--batch: goes with --speed only"]),
        ([*RATES, "--accepted", "6"], ["--accepted 6", "draft.tokens 4", "at most 5 tokens"]),
        ([*RATES, "--measured", "nowhere.csv"], ["nowhere.csv"]),
        ([*RATES, "--measured", str(SCRIPT)], ["no line for the bandwidth of a copy"]),
        (
            [*RATES, "--accepted", "2", "--kv-compression-config", '{"trigger": "interval"}'],
            ["--accepted", "trigger end_of_prompt"],
        ),
        (
            [*RATES, "--accepted", "2"]
            + ["--kv-compression-config", '{"draft": {"budget": {"ratio": 0.05}}}'],
            ["--accepted", "without codebook and draft.budget"],
        ),
    ],
)
def test_errors_are_one_sentence(plan: Plan, options: list[str], words: list[str]) -> None:
    status, out, err = plan(*options)
    assert (status, out) == (1, "")
    assert err.startswith("kvcompress: error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bandwidth", "4.8TB"], ["'4.8TB' is not a rate above 0", "4.8TB/s"]),
        (["--bandwidth", "0"], ["'0' is not a rate above 0"]),
        (["--flops", "-1"], ["'-1' is not a rate above 0"]),
        (["--flops", "fast"], ["'fast' is not a rate", "990TFLOP/s"]),
        (["--link-bandwidth", "1GiB/s"], ["'1GiB/s' is not a rate"]),
        (["--launch-us", "nan"], ["must be 0 or more, got nan"]),
        (["--accepted", "0.5"], ["must be 1 or more, got 0.5"]),
        (["--batch", "1,0"], ["must be whole numbers from 1 up, got 1,0"]),
        (["--batch", "1,x"], ["invalid", "'1,x'"]),
        (["--machine", "h300"], ["invalid choice", "h200"]),
    ],
)
def test_wrong_options(
    plan: Plan, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        plan("--speed", *options)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err


def test_it_needs_no_vllm(probe_model: str) -> None:
    code = (
        "import sys; from vllm_kvcompress.cli.main import main\n"
        "status = main(sys.argv[1:])\n"
        "assert 'vllm' not in sys.modules; sys.exit(status)"
    )
    arguments = ["plan", "--prompt-len=2000", "--kv-compression=windowkv", f"--model={probe_model}"]
    arguments += ["--speed", "--machine=a100"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "COMPUTED" in done.stdout


# --- docs/performance.md ------------------------------------------------------------------


@pytest.fixture
def tables() -> ModuleType:
    """Imported late: Triton comes with it, which tests of kernels set up first."""
    return importlib.import_module("lab.performance_tables")


def test_the_page_is_what_the_code_gives(tables: ModuleType) -> None:
    """After a change: python scripts/lab/performance_tables.py"""
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.render(text) == text
    assert text.count("<!-- computed: ") == text.count("<!-- end -->") == len(tables.BLOCKS)
    assert "COMPUTED, nothing is measured" in text


def test_a_number_that_was_changed_by_hand_is_found(tables: ModuleType, monkeypatch) -> None:
    monkeypatch.setattr(tables, "BLOCKS", {"one": lambda: "| 1 |"})
    page = "before\n<!-- computed: one -->\n{}\n<!-- end -->\nafter\n"
    assert tables.render(page.format("| 2 |")) == page.format("| 1 |")
    assert tables.render(page.replace("{}\n", "")) == page.format("| 1 |")


def test_the_page_says_what_plan_says(tables: ModuleType) -> None:
    """Llama-3-8B at 32k: 750 ms by hand, 739 TFLOP and the head's products at 989 TFLOP/s."""
    flops = 2 * 6_979_321_856 * 32768 + 4 * 32 * 4096 * 32768 * 32769 / 2
    assert f"| 32,768 | {flops / 1e12:.0f} | {flops / 989e9:.0f} |" in tables.once("Llama-3-8B")

"""scripts/bench_kernels.py: its bytes, its checks and its verdicts, on a machine without a GPU."""

import argparse
import csv
import importlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lab.kernel_bench.inputs import Case, Shape
from lab.kernel_bench.rows import (
    BOTH,
    NOT_MEASURED,
    ROWS,
    Result,
    difference,
    verdicts,
)
from vllm_kvcompress.speed.machine import read_measured

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "bench_kernels.py"
TWO = Shape(1024, 2)  # two requests; a token's keys are 8 * 128 * 2 = 2048 bytes
ONE = Shape(1024, 1, layers=32)  # 12 % of 1024 in whole blocks of 16: 128 tokens
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="tests what a CPU does")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Checks and times; imported late, because it switches Triton's interpreter on."""
    return importlib.import_module("lab.kernel_bench.measure")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        # 32 layers of 128 rows of 4096 bytes, read and written, and 8 indices of 8 bytes each
        ("compact_pages", ONE, 32 * 128 * (8192 + 64)),
        ("compact_pages_rotating", replace(ONE, batch=2), 67_633_152),
        # keys twice: 8,388,608; queries twice: 2 * 2 * 16 * 8192; scores: 2 * 8 * 1024 * 4
        ("token_scores_w16", TWO, 8_388_608 + 524_288 + 65_536),
        ("token_scores_w32", TWO, 8_388_608 + 1_048_576 + 65_536),
        # keys and queries once, 32 windows
        ("window_scores_w16", TWO, 4_194_304 + 262_144 + 2_048),
        ("key_similarity", TWO, 8_388_608 + 65_536),
        ("lag_scores", TWO, 8_388_608 + 65_536),
        # 256 rows of 1024 scores, five times, and 128 numbers of 8 bytes; 1024 bools
        ("select_tokens", ONE, 256 * (20_480 + 1_024) + 1_024),
        # keys twice, scores; as many queries as tokens, twice
        ("key_redundancy", ONE, 2 * 2_097_152 + 32_768),
        ("prompt_attention", ONE, 2 * (2_097_152 + 1_024 * 8_192) + 32_768),
        # positions, 4 groups of slots and 64 blocks
        ("physical_slots_prefill", TWO, 2 * (8_192 + 4 * (8_192 + 256))),
        ("physical_slots_decode", TWO, 2 * (8 + 4 * 12)),
        # all slots, 64 rows of 8192 bytes read and written
        ("store_rows_prefill", TWO, 16_384 + 2 * 1_048_576),
        ("store_rows_decode", TWO, 16 + 2 * 16_384),
        # 32 problems: 1024 vectors of 256 bytes three times, 131,072 + 65,536 of the graph
        ("build_codebook", TWO, 32 * (786_432 + 196_608 + 16_384)),
        # codes, two books of 512 entries, queries and outputs, logarithms
        ("codebook_attention", TWO, 196_608 + 4_194_304 + 32_768 + 256),
        ("paged_attention", TWO, 2 * 128 * 4_096 + 32_768),
        # 32 layers scored, or 4; then select_tokens and compact_pages as above
        ("prompt_snapkv", ONE, 32 * (2 * 2_621_440 + 32_768) + 5_506_048 + 33_816_576),
        ("prompt_keydiff", ONE, 32 * (2 * 2_097_152 + 32_768) + 5_506_048 + 33_816_576),
        ("prompt_windowkv", ONE, 4 * (2_097_152 + 131_072 + 1_024) + 5_506_048 + 33_816_576),
    ],
)
def test_bytes_by_hand(name: str, shape: Shape, expected: int) -> None:
    assert ROWS[name].num_bytes(shape) == expected


def test_every_row_has_a_formula_and_needs_at_least_what_it_moves() -> None:
    for row in ROWS.values():
        assert row.formula
        moved_once = row.num_bytes(replace(ONE, tokens=32768)) / 5
        assert row.memory(replace(ONE, tokens=32768)) > moved_once, row.name


def test_difference() -> None:
    ones = torch.ones(4)
    assert difference(ones, ones.clone()) == 0
    assert difference(ones + torch.tensor([0, 0, 0, 0.5]), ones) == 0.25
    assert difference(torch.tensor([1.0, math.nan]), torch.ones(2)) == math.inf
    assert difference(ones, torch.ones(5)) == math.inf
    assert difference(ones.half(), ones) == math.inf
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf
    assert difference(torch.zeros(4), torch.zeros(4)) == 0
    one, other = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, True])
    assert difference(one, other) == 1.0


@INTERPRETED
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.needs == "triton"])
def test_kernels_pass_the_small_check(script: ModuleType, monkeypatch, name: str) -> None:
    row = ROWS[name]
    if name == "build_codebook":
        row = replace(row, small=60)
    assert script.small_check(row, 3, "LBHNC") <= min(row.tolerance, 1e-4)


@INTERPRETED
def test_a_prompt_keeps_the_same_tokens_in_place_and_in_copies(script: ModuleType) -> None:
    pytest.importorskip("vllm")
    assert script.small_check(ROWS["prompt_keydiff"], 3, "LBNHC") <= 0.01


def arguments(**changes) -> argparse.Namespace:
    given = {
        "rows": ["key_similarity"], "tokens": [64, 128], "batch": [1], "models": ["llama-3-8b"],
        "layout": "LBNHC", "no_torch": False, "time_limit": math.inf, "seed": 5,
    }  # fmt: skip
    return argparse.Namespace(**given | changes)


def pretend_gpu(script: ModuleType, monkeypatch) -> None:
    """Everything that a GPU run does, on the CPU, with made-up times."""
    monkeypatch.setattr(script, "ON_GPU", True)
    monkeypatch.setattr(script, "synchronize", lambda: None)
    monkeypatch.setattr(script, "too_large", lambda need: None)
    monkeypatch.setattr(script, "measure", lambda run: (1.0, 0.9, 2.0))


@INTERPRETED
@pytest.mark.parametrize("fault", ["none", "small", "large", "unwritten", "raises"])
def test_a_wrong_answer_has_no_speed(script: ModuleType, monkeypatch, fault: str) -> None:
    pretend_gpu(script, monkeypatch)
    row = ROWS["lag_scores"]

    def make(shape: Shape, generator: torch.Generator) -> Case:
        wanted = torch.rand(shape.tokens, generator=generator)

        def kernel() -> torch.Tensor:
            if fault == "raises":
                raise RuntimeError("no such instruction")
            out = torch.empty(shape.tokens)
            if fault == "unwritten":
                assert out.isnan().all(), "else an old answer could stand in for a missing one"
            count = shape.tokens - (fault == "unwritten")
            out[:count] = wanted[:count]
            if fault == "small" or (fault == "large" and shape.tokens == 128):
                out[7] += 0.1
            return out

        return Case(kernel, lambda: wanted)

    monkeypatch.setitem(ROWS, "key_similarity", replace(row, make=make))
    run = importlib.import_module("lab.kernel_bench.command").run
    results, good = run(arguments(), lambda result: None)
    times = [len(result.times) for result in results]
    expected = {"none": [2, 2], "large": [2, 0], "small": [0], "unwritten": [0], "raises": [0]}
    assert times == expected[fault] and good == (fault == "none")
    assert all(result.is_red == (not result.times) for result in results)
    if fault == "unwritten":
        assert results[0].notes["triton"] == "WRONG by inf at the small size"
    lines = [line for result in results if result.is_red for line in result.columns(1.0)]
    speeds = [line[7] for line in lines if line[5] in ("time", "achieved", "share of copy")]
    assert not any(speeds) and len(speeds) == 6 * sum(r.is_red for r in results)


def test_sizes_that_do_not_fit_say_so(script: ModuleType, monkeypatch) -> None:
    monkeypatch.setattr(script, "ON_GPU", True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 << 30, 0))
    assert script.too_large(20 << 30) == "skipped: needs 21 GiB"
    assert script.too_large(1 << 30) is None
    assert ROWS["prompt_snapkv"].most(TWO) and not ROWS["prompt_snapkv"].most(ONE)
    assert ROWS["store_rows_prefill"].most(Shape(32768, 8))
    # All layers of 64 prompts of 128k tokens take terabytes.
    assert ROWS["compact_pages"].memory(Shape(131072, 64, 32)) > 1 << 40


def result(name: str, milliseconds: float, model: str = BOTH, layers: int = 1) -> Result:
    shape = Shape(32768, 1, layers)
    return Result(ROWS[name], model, shape, times={"triton": (milliseconds,) * 3})


def test_verdicts() -> None:
    # 32 layers of 3936 survivors of 8256 bytes make 1.04 GB: 1.04 TB/s in one millisecond.
    found = [
        result("compact_pages", 0.5, "llama-3-8b", 32),
        result("compact_pages_rotating", 1.0, "llama-3-8b", 32),
        result("prompt_snapkv", 20.0, "llama-3-8b", 32),
    ]
    lines = {line[0]: line for line in verdicts(found, 2500.0, "NVIDIA H200", 3.0)}
    assert lines["compact_pages"][3:] == ["83%", "met"]
    assert lines["compact_pages_rotating"][3:] == ["42%", "missed"]
    assert lines["prompt_snapkv"][3:] == ["20.00 ms, 0.67%", "met"]
    assert lines["prompt_windowkv"][4] == lines["token_scores_w32"][4] == NOT_MEASURED
    lines = {line[0]: line for line in verdicts(found, 2500.0, "NVIDIA H200", 1.0)}
    assert lines["prompt_snapkv"][4] == "missed"
    lines = {line[0]: line for line in verdicts(found, 2500.0, "NVIDIA H200", None)}
    assert lines["prompt_snapkv"][3:] == ["20.00 ms", "prefill not measured in this run"]
    for line in verdicts(found, 2500.0, "CPU", 3.0):
        assert line[3:] == ["", NOT_MEASURED]


@INTERPRETED
def test_a_run_without_vllm_writes_its_files(tmp_path: Path) -> None:
    """Only torch and triton: everything else the package knows is hidden."""
    hide = "import sys; sys.modules.update(dict.fromkeys(['vllm', 'pydantic', 'rich', 'yaml']))"
    path = f"sys.path.insert(0, {str(SCRIPT.parent)!r})"
    main = f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    out = tmp_path / "results"
    options = ["--out", str(out), "--rows", "key_similarity", "paged_attention", "prompt_keydiff",
               "--tokens", "64", "--seed", "1"]  # fmt: skip
    command = [sys.executable, "-c", f"{hide}; {path}; {main}", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "prompt_keydiff: vllm is not installed" in done.stdout
    assert "Triton kernels are only checked" in done.stdout
    text = (out / "kernels.csv").read_text()
    rows = {(r["kernel"], r["provider"], r["metric"]): r for r in csv.DictReader(text.splitlines())}
    assert rows["key_similarity", "triton", "time"]["median"] == ""
    assert rows["key_similarity", "triton", "time"]["note"].startswith(NOT_MEASURED)
    assert float(rows["key_similarity", "torch", "time"]["median"]) > 0
    assert float(rows["key_similarity", "triton", "error at small size"]["median"]) < 1e-3
    assert float(rows["copy", "torch", "achieved"]["median"]) > 0
    # What plan --speed --measured reads: 2 * 512^3 FLOPs in the median time.
    product = rows["matmul", "torch", "time"], rows["matmul", "torch", "achieved"]
    assert [row["unit"] for row in product] == ["ms", "TFLOP/s"]
    milliseconds, rate = (float(row["median"]) for row in product)
    assert rate * milliseconds == pytest.approx(2 * 512**3 / 1e9, rel=1e-2)
    rates = read_measured(out / "kernels.csv")
    assert rates.flops == pytest.approx(rate * 1e12)
    assert rates.bandwidth == float(rows["copy", "torch", "achieved"]["median"]) * 1e9
    about = json.loads((out / "run.json").read_text())
    assert about["command"].startswith("scripts/bench_kernels.py --out results --rows")
    assert str(tmp_path) not in text + json.dumps(about)
    assert (out / "kernels.png").stat().st_size > 10_000
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 2 and "never overwritten" in again.stderr

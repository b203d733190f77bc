"""Every kernel compiles for an H200 (sm_90), spills no registers and moves rows 16 bytes at a time.

Compiling needs no GPU. What it cannot show is speed. An A100 (sm_80) and a B200 (sm_100) are tried
with a part of the kernels; `scripts/lab/compile_table.py` compiles all that any preset launches.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.variants import READ_ROWS, SHARED, WRITE_ROWS

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
MODULES = sorted(
    f"{path.parent.name}.{path.stem}"
    for path in HERE.glob("*/test_*.py")
    if "\ndef sm90_launches" in path.read_text()
)
NARROW_TOO = {"_split_kernel"}  # a token's codes are six numbers of 16 bits

ELSEWHERE = [
    "cache.test_store_rows", "scores.test_window", "scores.test_keys", "codebook.test_build",
    "codebook.test_attention", "compaction.test_compact_pages", "compaction.test_select_tokens",
    "scores.test_redundancy",
]  # fmt: skip
"""Those whose kernels once spilled on one of these GPUs alone, and some more."""


def compile_for(target: int, modules: list[str]) -> dict[str, list[dict]]:
    """What the compiler made of every launch, by kernel."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.sm90"]
    command += ["--target", str(target), *(f"tests.kernels.{module}" for module in modules)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[dict]]:
    """Every kernel for an H200."""
    return compile_for(90, MODULES)


def test_every_jitted_kernel_is_compiled(compiled) -> None:
    launched = set()
    for path in (ROOT / "kernels").rglob("*.py"):
        launched |= set(re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE))
    assert launched == compiled.keys()


def test_nothing_is_spilled_and_shared_memory_suffices(compiled) -> None:
    check_fits(compiled, 90)


def test_rows_move_16_bytes_at_a_time(compiled) -> None:
    assert compiled.keys() >= READ_ROWS | WRITE_ROWS
    check_wide(compiled)


@pytest.mark.parametrize("target", [80, 100])
def test_other_gpus(target: int) -> None:
    found = compile_for(target, ELSEWHERE)
    assert found.keys() >= {"_store_kernel", "_stats_kernel", "_token_kernel", "_window_kernel"}
    assert found.keys() >= {"_lag_kernel", "_graph_kernel", "_split_kernel", "_rotate_kernel"}
    assert "_latest_kernel" in found
    check_fits(found, target)
    check_wide(found)


@pytest.mark.parametrize("target", [89, 100])
def test_other_gpus_with_caches_of_8_bits(target: int) -> None:
    """Those of capability 8.9, an L4 or L40S, are the oldest whose attention vLLM lets read one."""
    found = compile_for(target, ["scores.test_eight_bits"])
    assert found.keys() >= {"_stats_kernel", "_token_kernel", "_window_kernel", "_copy_kernel"}
    check_fits(found, target)
    check_wide(found)


def check_fits(compiled: dict[str, list[dict]], target: int) -> None:
    for name, variants in compiled.items():
        for each in variants:
            assert each["stack"] == 0, f"{name} spills: {each}"
            assert each["shared"] <= SHARED[target], f"{name} does not fit: {each}"


def check_wide(compiled: dict[str, list[dict]]) -> None:
    for name in READ_ROWS & compiled.keys():
        for each in compiled[name]:
            wide = [load for load in each["loads"] if ".v4.b32" in load or "async.cg" in load]
            assert wide, f"{name} reads narrowly: {each}"
            narrow = [load for load in each["loads"] if load.endswith((".b16", ".b8"))]
            assert not narrow or name in NARROW_TOO, f"{name} reads narrowly: {each}"
    for name in WRITE_ROWS & compiled.keys():
        for each in compiled[name]:
            assert any(".v4.b32" in store for store in each["stores"]), f"{name}: {each}"

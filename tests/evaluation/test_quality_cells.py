"""Cells of the report of `kvcompress eval`: means, flips, drifts, the CSV."""

import csv
import json
from pathlib import Path

import pytest

from tests.evaluation.records import ABOUT, only, record, small_run
from vllm_kvcompress.evaluation.quality.answers import find_drifts, find_flips
from vllm_kvcompress.evaluation.quality.cells import (
    COLUMNS,
    continuation_tasks,
    make_cells,
    make_overall,
    write_csv,
)
from vllm_kvcompress.evaluation.quality.intervals import (
    newcombe,
    wilson,
)
from vllm_kvcompress.evaluation.quality.records import BASELINE


def test_a_cell_by_hand() -> None:
    cells = make_cells(small_run())
    whole, half = only(cells, policy=BASELINE), only(cells, policy="snapkv")
    assert (whole.n, whole.mean, whole.against) == (4, 0.75, None)
    assert (half.n, half.length, half.kept) == (3, 4096, pytest.approx(0.52))
    assert half.mean == pytest.approx(2 / 3)
    assert half.interval == wilson(2, 3)
    against = half.against
    assert against is not None
    # d has no compressed answer: the baseline is a, b and c.
    assert (against.n, against.lost, against.gained) == (3, 1, 1)
    assert against.baseline == pytest.approx(2 / 3)
    assert against.share == pytest.approx(1.0)
    assert against.difference == newcombe(1, 1, 1, 0)
    assert against.drift == pytest.approx((10 + 40 + 10) / (8 * 3))


@pytest.mark.parametrize(
    ("before", "after", "lost", "gained"),
    [(1.0, 0.49, 1, 0), (0.5, 0.4, 1, 0), (0.49, 0.5, 0, 1), (0.5, 1.0, 0, 0), (0.4, 0.1, 0, 0)],
)
def test_half_right_is_right(before: float, after: float, lost: int, gained: int) -> None:
    records = [record(score=before), record("snapkv", 0.5, after)]
    against = only(make_cells(records), policy="snapkv").against
    assert against is not None and (against.lost, against.gained) == (lost, gained)
    assert [flip.lost for flip in find_flips(records)] == [True] * lost + [False] * gained


def test_the_baseline_of_the_other_protocol_does_not_count() -> None:
    records = [record(), record("snapkv", 0.5, protocol="hidden")]
    assert only(make_cells(records), policy="snapkv").against is None


def test_a_sample_measured_twice_counts_once() -> None:
    cell = only(make_cells([record(score=0.0), record(score=1.0)]), policy=BASELINE)
    assert (cell.n, cell.mean) == (1, 1.0)


def test_lengths_apart_and_together() -> None:
    records = [record(sample="a"), record(sample="b", length=8192, score=0.0)]
    assert [(c.length, c.mean) for c in make_cells(records)] == [(4096, 1.0), (8192, 0.0)]
    (pooled,) = make_cells(records, by_length=False)
    assert (pooled.length, pooled.n, pooled.mean) == (None, 2, 0.5)


def test_kept_is_known_only_if_every_samples_is() -> None:
    records = [
        record("snapkv", 0.5, sample=name, kept=kept)
        for name, kept in zip("ab", (0.5, None), strict=True)
    ]
    assert make_cells(records)[0].kept is None


def test_every_task_counts_the_same() -> None:
    records = small_run()
    for name, after in (("x", 0.25), ("y", 0.75)):
        records.append(record(task="hotpotqa", sample=name, score=1.0))
        records.append(record("snapkv", 0.5, after, task="hotpotqa", sample=name))
    pooled = make_cells(records, by_length=False)
    half = next(each for each in make_overall(pooled) if each.policy == "snapkv")
    assert (half.tasks, half.n) == (2, 5)
    assert half.mean == pytest.approx((2 / 3 + 0.5) / 2)
    assert half.share == pytest.approx((2 / 3 + 0.5) / (2 / 3 + 1.0))
    assert half.interval.low < half.mean < half.interval.high
    alone = next(e for e in make_overall(pooled, ["hotpotqa"]) if e.policy == "snapkv")
    assert (alone.tasks, alone.mean) == (1, pytest.approx(2 / 3))


def test_predicted_texts_have_means_of_nll_and_kl() -> None:
    records = [record(task="text", nll=2.0)]
    for name, kl in (("a", 0.1), ("b", 0.3)):
        records.append(record("snapkv", 0.5, 0.9, task="text", sample=name, nll=2.0 + kl, kl=kl))
    cell = only(make_cells(records), policy="snapkv")
    assert (cell.kl, cell.nll) == (pytest.approx(0.2), pytest.approx(2.2))
    assert continuation_tasks([*records, record()]) == {"text"}


def test_flips_name_both_answers_and_tasks_take_turns() -> None:
    flips = find_flips(small_run())
    assert [(f.before.answer, f.after.answer, f.lost) for f in flips] == [
        ("whole b", "half b", True),
        ("whole c", "half c", False),
    ]
    many = []
    for task in ("first", "second"):
        for name in "ab":
            many.append(record(task=task, sample=name))
            many += [record("snapkv", b, 0.0, task=task, sample=name) for b in (0.1, 0.5)]
    order = [(flip.after.budget, flip.after.task) for flip in find_flips(many)]
    turns = ["first", "second"] * 2
    assert order == [*((0.5, task) for task in turns), *((0.1, task) for task in turns)]


def test_drift_is_over_samples_with_a_baseline() -> None:
    (found,) = find_drifts([*small_run(), record("snapkv", 0.5, sample="e", answer_tokens=999)])
    assert (found.n, found.mean, found.baseline) == (3, 20.0, 8.0)
    assert found.ratio == pytest.approx(2.5)
    (silent,) = find_drifts([record(answer_tokens=0), record("snapkv", 0.5)])
    assert silent.ratio is None


def test_the_csv_says_what_it_was_measured_with(tmp_path: Path) -> None:
    path = tmp_path / "cells.csv"
    write_csv(small_run(), path, ABOUT)
    about, *rest = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(about.removeprefix("# ")) == ABOUT
    whole, half = csv.DictReader(rest)
    assert list(whole) == list(COLUMNS)
    assert whole["share_of_baseline"] == whole["lost"] == ""
    assert (half["n"], half["paired"], half["lost"], half["gained"]) == ("3", "3", "1", "1")
    assert float(half["mean"]) == pytest.approx(2 / 3, abs=1e-5)
    assert float(half["low"]) == pytest.approx(wilson(2, 3).low, abs=1e-5)

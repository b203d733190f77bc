"""Records of ``kvcompress eval``, grouped: means, intervals, and what became of the same samples.

A cell is one task at one length under one setting. Everything that is relative to the baseline is
taken over the samples that were measured under both, so that a run that was cut short compares
like with like.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any

from vllm_kvcompress.evaluation.quality.intervals import (
    Interval,
    mean_interval,
    mean_of_parts,
    paired_interval,
)
from vllm_kvcompress.evaluation.quality.records import BASELINE, Record
from vllm_kvcompress.evaluation.whole_files import whole

RIGHT = 0.5
"""From this score on an answer counts as right where flips are counted."""


@dataclass(frozen=True)
class Against:
    """A setting against the whole cache, over the samples that have both.

    Attributes
    ----------
    n : int
        How many.
    mean, baseline : float
        Mean scores.
    difference : Interval
        95 %, of mean - baseline.
    lost, gained : int
        Samples that the whole cache had right and the compressed one wrong, and the other way
        round; see `RIGHT`.
    drift : float or None
        Mean length of the answers over the baseline's; None where the baseline says nothing.
    """

    n: int
    mean: float
    baseline: float
    difference: Interval
    lost: int
    gained: int
    drift: float | None

    @property
    def share(self) -> float | None:
        """Score as a share of the baseline's; None where that is 0."""
        return self.mean / self.baseline if self.baseline > 0 else None


@dataclass(frozen=True)
class Cell:
    """One task at one length under one setting.

    Attributes
    ----------
    task, protocol, policy, budget
        As in `Record`.
    length : int or None
        As in `Record`; None for all lengths together.
    n : int
        Samples.
    mean : float
        Of the scores, 0 to 1.
    interval : Interval
        95 %, of the mean.
    kept : float or None
        Mean share of the cache bytes held; None if one sample's is not known.
    answer_tokens : float
        Mean length of an answer.
    nll, kl : float or None
        Means over the samples that have them, nats per token.
    against : Against or None
        None for the baseline itself and where no sample has both.
    """

    task: str
    length: int | None
    protocol: str
    policy: str
    budget: float
    n: int
    mean: float
    interval: Interval
    kept: float | None
    answer_tokens: float
    nll: float | None
    kl: float | None
    against: Against | None


@dataclass(frozen=True)
class Overall:
    """One setting over tasks; every task counts the same, and in a task every sample.

    Attributes
    ----------
    protocol, policy, budget
        As in `Record`.
    tasks : int
        How many tasks it was measured on.
    n : int
        Samples.
    mean, interval, kept
        As in `Cell`, of the tasks' means.
    share : float or None
        Of the baseline's mean over the same samples of the same tasks.
    difference : Interval or None
        95 %, of the mean's difference to the baseline's.
    """

    protocol: str
    policy: str
    budget: float
    tasks: int
    n: int
    mean: float
    interval: Interval
    kept: float | None
    share: float | None
    difference: Interval | None


Pair = tuple[Record, Record]
"""The same sample under a setting and under the baseline."""


def unique(records: Iterable[Record]) -> list[Record]:
    """The last record of each sample and setting, in the order they were first measured."""
    return list({record.key: record for record in records}.values())


def continuation_tasks(records: Iterable[Record]) -> set[str]:
    """Tasks that predict a text instead of answering; their scores are agreement with the whole
    cache, and means with answers' scores would say nothing."""
    return {each.task for each in records if each.nll is not None or each.kl is not None}


def make_cells(records: Iterable[Record], by_length: bool = True) -> list[Cell]:
    """Group records, in the order in which they come.

    Parameters
    ----------
    records : iterable of Record
        Of one run.
    by_length : bool
        Whether lengths are kept apart.
    """
    records = unique(records)
    whole = baselines(records)
    groups = defaultdict(list)
    for each in records:
        length = each.length if by_length else None
        groups[each.task, length, each.protocol, each.policy, each.budget].append(each)
    return [_cell(*key, group, whole) for key, group in groups.items()]


def make_overall(pooled: Iterable[Cell], leave_out: Iterable[str] = ()) -> list[Overall]:
    """Means over tasks.

    Parameters
    ----------
    pooled : iterable of Cell
        With all lengths together.
    leave_out : iterable of str
        Tasks that do not count, see `continuation_tasks`.
    """
    not_counted = set(leave_out)
    groups = defaultdict(list)
    for cell in pooled:
        if cell.task not in not_counted:
            groups[cell.protocol, cell.policy, cell.budget].append(cell)
    return [_overall(*key, cells) for key, cells in groups.items()]


def mean_tokens(pairs: Sequence[Pair]) -> tuple[float, float]:
    """Mean lengths of the answers: compressed, whole."""
    afters, befores = zip(*pairs, strict=True)
    return _mean(afters, "answer_tokens"), _mean(befores, "answer_tokens")


def baselines(records: Iterable[Record]) -> dict[tuple[str, str, str], Record]:
    """The whole cache's records by task, sample and protocol."""
    found = (each for each in records if each.policy == BASELINE)
    return {(each.task, each.sample, each.protocol): each for each in found}


def pairs_of(
    records: Iterable[Record], whole: Mapping[tuple[str, str, str], Record]
) -> Iterable[Pair]:
    """Records that have a baseline, with it; in the order of `records`."""
    for each in records:
        before = whole.get((each.task, each.sample, each.protocol))
        if each.policy != BASELINE and before is not None:
            yield each, before


def _mean(records: Sequence[Record], name: str) -> float:
    return fsum(getattr(each, name) for each in records) / len(records)


def _mean_if(records: Sequence[Record], name: str) -> float | None:
    """Over the records that have the number."""
    having = [each for each in records if getattr(each, name) is not None]
    return _mean(having, name) if having else None


def _cell(
    task: str,
    length: int | None,
    protocol: str,
    policy: str,
    budget: float,
    records: list[Record],
    whole: Mapping[tuple[str, str, str], Record],
) -> Cell:
    pairs = list(pairs_of(records, whole))
    known = all(each.kept is not None for each in records)
    return Cell(
        task=task,
        length=length,
        protocol=protocol,
        policy=policy,
        budget=budget,
        n=len(records),
        mean=_mean(records, "score"),
        interval=mean_interval([each.score for each in records]),
        kept=_mean(records, "kept") if known else None,
        answer_tokens=_mean(records, "answer_tokens"),
        nll=_mean_if(records, "nll"),
        kl=_mean_if(records, "kl"),
        against=_against(pairs) if pairs else None,
    )


def _against(pairs: Sequence[Pair]) -> Against:
    afters, befores = zip(*pairs, strict=True)
    mine, other = ([each.score for each in side] for side in (afters, befores))
    tokens, baseline_tokens = mean_tokens(pairs)
    sides = [(after >= RIGHT, before >= RIGHT) for after, before in zip(mine, other, strict=True)]
    return Against(
        n=len(pairs),
        mean=_mean(afters, "score"),
        baseline=_mean(befores, "score"),
        difference=paired_interval(mine, other),
        lost=sides.count((False, True)),
        gained=sides.count((True, False)),
        drift=tokens / baseline_tokens if baseline_tokens > 0 else None,
    )


def _overall(protocol: str, policy: str, budget: float, cells: Sequence[Cell]) -> Overall:
    def mean(of: Callable[[Any], float], parts: Sequence[Any]) -> float:
        return fsum(of(part) for part in parts) / len(parts)

    known = all(cell.kept is not None for cell in cells)
    both = [cell.against for cell in cells if cell.against is not None]
    share = difference = None
    if both:
        baseline = mean(lambda each: each.baseline, both)
        share = mean(lambda each: each.mean, both) / baseline if baseline > 0 else None
        steps = [each.mean - each.baseline for each in both]
        difference = mean_of_parts(steps, [each.difference for each in both])
    return Overall(
        protocol=protocol,
        policy=policy,
        budget=budget,
        tasks=len(cells),
        n=sum(cell.n for cell in cells),
        mean=mean(lambda cell: cell.mean, cells),
        interval=mean_of_parts([cell.mean for cell in cells], [cell.interval for cell in cells]),
        kept=mean(lambda cell: cell.kept, cells) if known else None,
        share=share,
        difference=difference,
    )


# --- CSV ----------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[Cell], Any]] = {
    "task": lambda cell: cell.task,
    "length": lambda cell: cell.length,
    "protocol": lambda cell: cell.protocol,
    "policy": lambda cell: cell.policy,
    "budget": lambda cell: cell.budget,
    "n": lambda cell: cell.n,
    "mean": lambda cell: cell.mean,
    "low": lambda cell: cell.interval.low,
    "high": lambda cell: cell.interval.high,
    "kept": lambda cell: cell.kept,
    "paired": lambda cell: cell.against and cell.against.n,
    "baseline_mean": lambda cell: cell.against and cell.against.baseline,
    "share_of_baseline": lambda cell: cell.against and cell.against.share,
    "difference_low": lambda cell: cell.against and cell.against.difference.low,
    "difference_high": lambda cell: cell.against and cell.against.difference.high,
    "lost": lambda cell: cell.against and cell.against.lost,
    "gained": lambda cell: cell.against and cell.against.gained,
    "answer_tokens": lambda cell: cell.answer_tokens,
    "length_drift": lambda cell: cell.against and cell.against.drift,
    "nll": lambda cell: cell.nll,
    "kl": lambda cell: cell.kl,
}
"""Columns of cells.csv and where they come from; empty where a cell has no such number."""


def write_csv(
    records: Iterable[Record], path: Path, measured_with: Mapping[str, Any] | None = None
) -> None:
    """Write one line per cell, after a comment that says with what it was measured.

    Parameters
    ----------
    records : iterable of Record
        Of one run.
    path : Path
        Written over.
    measured_with : mapping, optional
        Versions and machine.
    """
    with whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        file.write("# " + json.dumps(dict(measured_with or {})) + "\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for cell in make_cells(records):
            writer.writerow([_plain(of(cell)) for of in COLUMNS.values()])


def _plain(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value

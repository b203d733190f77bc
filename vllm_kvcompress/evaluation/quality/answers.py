"""What became of the answers themselves: those that changed sides, and how long they are."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_kvcompress.evaluation.quality.cells import (
    RIGHT,
    Pair,
    baselines,
    mean_tokens,
    pairs_of,
    unique,
)
from vllm_kvcompress.evaluation.quality.records import Record


@dataclass(frozen=True)
class Flip:
    """A sample whose answer changed sides.

    Attributes
    ----------
    before, after : Record
        Under the whole and the compressed cache.
    """

    before: Record
    after: Record

    @property
    def lost(self) -> bool:
        """Whether it was right before."""
        return self.before.score >= RIGHT


@dataclass(frozen=True)
class Drift:
    """Lengths of answers under one setting, over all tasks.

    Attributes
    ----------
    protocol, policy, budget
        As in `Record`.
    n : int
        Samples that have a baseline.
    mean, baseline : float
        Mean tokens of their answers, compressed and whole.
    """

    protocol: str
    policy: str
    budget: float
    n: int
    mean: float
    baseline: float

    @property
    def ratio(self) -> float | None:
        """Compressed over whole; None where the baseline says nothing."""
        return self.mean / self.baseline if self.baseline > 0 else None


def find_flips(records: Iterable[Record]) -> list[Flip]:
    """Samples whose answer changed sides: lost ones first, then those that kept most. Tasks take
    turns, so that the beginning of the list shows all of them."""
    records = unique(records)
    turns: defaultdict[tuple[bool, float, str], int] = defaultdict(int)
    found = []
    for after, before in pairs_of(records, baselines(records)):
        flip = Flip(before, after)
        if flip.lost == (after.score >= RIGHT):
            continue
        place = (not flip.lost, -after.budget, after.task)
        turns[place] += 1
        found.append(((*place[:2], turns[place]), flip))
    return [flip for _, flip in sorted(found, key=lambda item: item[0])]


def find_drifts(records: Iterable[Record]) -> list[Drift]:
    """Lengths of answers against the baseline's, one per protocol, policy and budget."""
    records = unique(records)
    groups: defaultdict[tuple[str, str, float], list[Pair]] = defaultdict(list)
    for after, before in pairs_of(records, baselines(records)):
        groups[after.protocol, after.policy, after.budget].append((after, before))
    return [Drift(*key, len(pairs), *mean_tokens(pairs)) for key, pairs in groups.items()]

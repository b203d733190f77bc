"""95 % intervals of mean scores, and of their difference to the whole cache on the same samples.

Scores are 0 to 1. Where all of them are 0 or 1 there are formulas that stay honest when every
answer is right; scores in between are resampled.

    one mean, 0/1         Wilson (1927), J. Am. Stat. Assoc. 22:209, without continuity correction
    one mean, in between  percentile bootstrap over samples, Efron (1979), Ann. Stat. 7:1; widened
                          for few samples as in Hesterberg (2015), Am. Stat. 69:371, section 4.3
    difference, 0/1       Newcombe (1998), Stat. Med. 17:2635, method 10
    mean over tasks       Zou and Donner (2008), Stat. Med. 27:1693, independent parts
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Z = NormalDist().inv_cdf(0.975)
RESAMPLES = 2000
_CHUNK = 1 << 20  # numbers drawn at once; bounds the memory of a mean over many samples


@dataclass(frozen=True)
class Interval:
    """Bounds of a 95 % interval, in the unit of what they bound."""

    low: float
    high: float


def wilson(right: int, total: int) -> Interval:
    """Of a share.

    Parameters
    ----------
    right, total : int
        Right answers of all; at least one in all.
    """
    share, shrink = right / total, 1 + Z * Z / total
    middle = (share + Z * Z / (2 * total)) / shrink
    half = Z / shrink * math.sqrt(share * (1 - share) / total + (Z / (2 * total)) ** 2)
    # Exact ends: rounding would leave 1e-17 where all answers are wrong.
    low = 0.0 if right == 0 else max(middle - half, 0.0)
    high = 1.0 if right == total else min(middle + half, 1.0)
    return Interval(low, high)


def bootstrap(values: Sequence[float], least: float = 0.0, most: float = 1.0) -> Interval:
    """Of a mean, by resampling; the same values give the same interval.

    Equal values cannot be resampled into a spread, which does not mean that there is none. Then
    the share of unlike samples that n equal ones leave possible (`wilson` of 0 in n) is taken to
    lie at either end of the scale.

    Parameters
    ----------
    values : sequence of float
        One per sample; at least one.
    least, most : float
        Ends of the scale.
    """
    array = np.asarray(values, dtype=np.float64)
    count = len(array)
    if np.ptp(array) == 0:
        value, unlike = float(array[0]), wilson(0, count).high
        return Interval(value - unlike * (value - least), value + unlike * (most - value))
    generator = np.random.default_rng(0)
    step = max(1, _CHUNK // count)
    means = np.concatenate(
        [
            array[generator.integers(0, count, (min(step, RESAMPLES - done), count))].mean(axis=1)
            for done in range(0, RESAMPLES, step)
        ]
    )
    tail = _widened_tail(count)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def mean_interval(scores: Sequence[float]) -> Interval:
    """Of a mean score: Wilson's where all scores are 0 or 1, else by bootstrap.

    Parameters
    ----------
    scores : sequence of float
        0 to 1, one per sample; at least one.
    """
    if _binary(scores):
        return wilson(round(sum(scores)), len(scores))
    return bootstrap(scores)


def paired_interval(scores: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Of mean(scores) - mean(baseline) over the same samples.

    Parameters
    ----------
    scores, baseline : sequence of float
        0 to 1, sample by sample in the same order; at least one.
    """
    pairs = list(zip(scores, baseline, strict=True))
    if not (_binary(scores) and _binary(baseline)):
        return bootstrap([mine - other for mine, other in pairs], least=-1.0, most=1.0)
    both = sum(mine == other == 1 for mine, other in pairs)
    gained = sum(mine > other for mine, other in pairs)
    lost = sum(mine < other for mine, other in pairs)
    return newcombe(both, gained, lost, len(pairs) - both - gained - lost)


def newcombe(both: int, first: int, second: int, neither: int) -> Interval:
    """Of the difference (first - second) of two shares over the same samples.

    Parameters
    ----------
    both, first, second, neither : int
        Samples right in both, only in the first, only in the second, in neither.
    """
    total = both + first + second + neither
    one, other = (both + first) / total, (both + second) / total
    of_one, of_other = wilson(both + first, total), wilson(both + second, total)
    product = (both + first) * (second + neither) * (both + second) * (first + neither)
    phi = 0.0
    if product:
        overlap = both * neither - first * second
        # Method 10 trusts a positive correlation less than a negative one.
        phi = (max(overlap - total / 2, 0.0) if overlap > 0 else overlap) / math.sqrt(product)

    def reach(mine: float, others: float) -> float:
        return math.sqrt(max(mine**2 - 2 * phi * mine * others + others**2, 0.0))

    low = reach(one - of_one.low, of_other.high - other)
    high = reach(of_one.high - one, other - of_other.low)
    return Interval(max(one - other - low, -1.0), min(one - other + high, 1.0))


def mean_of_parts(means: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """Of the unweighted mean of independent means, such as of tasks.

    Parameters
    ----------
    means : sequence of float
        One per part; at least one.
    intervals : sequence of Interval
        Theirs, in the same order.
    """
    pairs, count = list(zip(means, intervals, strict=True)), len(means)
    mean = math.fsum(means) / count
    below = math.sqrt(math.fsum((value - each.low) ** 2 for value, each in pairs)) / count
    above = math.sqrt(math.fsum((each.high - value) ** 2 for value, each in pairs)) / count
    return Interval(mean - below, mean + above)


def _binary(scores: Sequence[float]) -> bool:
    return all(score in (0, 1) for score in scores)


def _widened_tail(count: int) -> float:
    """Share of the resampled means beyond each bound, below 2.5 % by as much as n is small."""
    freedom = count - 1
    # Student's t from the normal quantile: Abramowitz and Stegun (1964), 26.7.5, three terms.
    z = Z
    t = z + (z**3 + z) / (4 * freedom)
    t += (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return NormalDist().cdf(-math.sqrt(count / freedom) * t)

"""What losses of n prompts prove about the mean loss of all prompts like them.

Losses are numbers in [0, 1], of prompts drawn independently from one distribution. Nothing else is
assumed of them.

    p-values      Hoeffding-Bentkus: Bates, Angelopoulos, Lei, Malik, Jordan (2021), "Distribution-
                  free, risk-controlling prediction sets", arXiv 2101.02703, section 3.1
    several tests Angelopoulos, Bates, Candes, Jordan, Lei (2021), "Learn then test", arXiv
                  2110.01052: fixed sequences, with Bonferroni's correction over the sequences
"""

import math
from collections.abc import Iterable

_ROUNDING = 1e-9  # of a sum of losses: 3.0000000000000004 is three whole losses
_HALVINGS = 50


def p_value(total: float, count: int, limit: float) -> float:
    """Of the hypothesis that the mean loss is above `limit`; small values speak against it.

    Where the hypothesis is true, a value of at most u comes up with a probability of at most u.

    Parameters
    ----------
    total : float
        Sum of the losses of `count` prompts, at least one.
    limit : float
        Between 0 and 1, both excluded.
    """
    mean = min(total / count, 1.0)
    hoeffding = math.exp(-count * _divergence(min(mean, limit), limit))
    whole = math.ceil(total - _ROUNDING)
    return min(hoeffding, math.e * _binomial_at_most(whole, count, limit), 1.0)


def upper_bound(total: float, count: int, level: float) -> float:
    """Largest mean loss that `p_value` does not refuse at `level`; above it all are refused.

    The mean loss is below it with a probability of at least 1 - `level`, for one setting that was
    fixed beforehand.
    """
    low, high = min(total / count, 1.0), 1.0
    if low <= 0:
        low = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if p_value(total, count, middle) > level:
            low = middle
        else:
            high = middle
    return high


def smallest_provable(count: int, level: float) -> float:
    """The `upper_bound` of prompts without any loss: (1 - r) ** count is `level` at this r."""
    return 1 - level ** (1 / count)


def prompts_needed(mean: float, limit: float, level: float) -> int | None:
    """Calibration prompts of this mean loss that suffice to prove `limit`; None if none do.

    Hoeffding's part alone, so that the number is enough and seldom the smallest.
    """
    if mean >= limit:
        return None
    return math.ceil(-math.log(level) / _divergence(mean, limit))


def num_rejected(p_values: Iterable[float], level: float) -> int:
    """Fixed-sequence testing: how many hypotheses fall before the first that stands.

    Each is tested at the whole `level`. Up to the first true one all rejections are right, and
    that one is rejected with a probability of at most `level`; so is any true one at all.
    """
    count = 0
    for value in p_values:
        if value > level:
            break
        count += 1
    return count


def _divergence(mean: float, limit: float) -> float:
    """Kullback-Leibler divergence of two coins, in nats."""
    first = mean * math.log(mean / limit) if mean > 0 else 0.0
    rest = 1 - mean
    return first + (rest * math.log(rest / (1 - limit)) if rest > 0 else 0.0)


def _binomial_at_most(most: int, count: int, chance: float) -> float:
    """Probability of at most `most` successes in `count` draws with this chance each."""
    if most >= count:
        return 1.0
    yes, no, all_ways = math.log(chance), math.log1p(-chance), math.lgamma(count + 1)
    return math.fsum(
        math.exp(
            all_ways - math.lgamma(k + 1) - math.lgamma(count - k + 1) + k * yes + (count - k) * no
        )
        for k in range(most + 1)
    )

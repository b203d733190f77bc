"""What losses of n prompts prove about the mean loss of all prompts like them.

Losses are numbers in [0, 1], of prompts drawn independently from one distribution. Nothing else is
assumed of them.

    p-values      Hoeffding-Bentkus: Bates, Angelopoulos, Lei, Malik, Jordan (2021), "Distribution-
                  free, risk-controlling prediction sets", arXiv 2101.02703, section 3.1
    betting       Waudby-Smith and Ramdas (2020), "Estimating means of bounded random variables by
                  betting", arXiv 2010.09686, with the stakes of Bates et al., section 3.1
    several tests Angelopoulos, Bates, Candes, Jordan, Lei (2021), "Learn then test", arXiv
                  2110.01052: fixed sequences, with Bonferroni's correction over the sequences
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

HOEFFDING_BENTKUS, BETTING = "hoeffding-bentkus", "betting"
TESTS = (HOEFFDING_BENTKUS, BETTING)
"""Which p-value; to be chosen before the losses are seen. The first looks at the mean loss alone
and takes every loss for a coin; the second is sharper where losses hardly differ, as shares of
tokens do, and a little blunter where they are 0 and 1."""

Losses = npt.NDArray[np.float64]

_ROUNDING = 1e-9  # of a sum of losses: 3.0000000000000004 is three whole losses
_HALVINGS = 50
_MOST_PROMPTS = 100_000  # looked at to say how many would be enough


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
    return _largest(lambda limit: p_value(total, count, limit) > level)


def _largest(stands: Callable[[float], bool]) -> float:
    """Where a condition on (0, 1) that holds below some number ends, not below it."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if stands(middle):
            low = middle
        else:
            high = middle
    return high


def prompts_needed(mean: float, limit: float, level: float) -> int | None:
    """Calibration prompts of this mean loss that suffice to prove `limit`; None if none do.

    Hoeffding's part alone, so that the number is enough and seldom the smallest.
    """
    if mean >= limit:
        return None
    return math.ceil(-math.log(level) / _divergence(mean, limit))


# --- betting ------------------------------------------------------------------------------


def betting_p_value(losses: Losses, limit: float, level: float) -> float:
    """As `p_value`, for losses in random order.

    A gambler stakes a part of his money on every loss being below the limit. Where the mean is
    above it he does not win on average, so that he multiplies his money by 1/u at any time with a
    probability of at most u (Ville's inequality).

    Parameters
    ----------
    losses : ndarray of float64, [n]
        At least one.
    level : float
        For which the stakes are good; the p-value is valid for every other, too.
    """
    number = np.arange(1, len(losses) + 1)
    means = (0.5 + losses.cumsum()) / (1 + number)
    variances = (0.25 + ((losses - means) ** 2).cumsum()) / (1 + number)
    before = np.concatenate([[0.25], variances[:-1]])  # a stake must not know its own loss
    stakes = np.minimum(1.0, np.sqrt(-2 * math.log(level) / (len(losses) * before)))
    money = np.log1p(-stakes * (losses - limit)).cumsum()
    return math.exp(-max(float(money.max()), 0.0))


def _enough_for_betting(losses: Losses, limit: float, level: float) -> int | None:
    count = 1
    while count <= _MOST_PROMPTS:
        if betting_p_value(np.resize(losses, count), limit, level) <= level:
            return count
        count += 1 + count // 50
    return None


# --- either -------------------------------------------------------------------------------


def p_of(test: str, losses: Losses, limit: float, level: float) -> float:
    """The p-value of one of `TESTS`."""
    if test == BETTING:
        return betting_p_value(losses, limit, level)
    return p_value(float(losses.sum()), len(losses), limit)


def bound_of(test: str, losses: Losses, level: float) -> float:
    """Largest mean loss that the test does not refuse at `level`, see `upper_bound`."""
    return _largest(lambda limit: p_of(test, losses, limit, level) > level)


def smallest_provable(test: str, count: int, level: float) -> float:
    """The bound of so many prompts without any loss."""
    return bound_of(test, np.zeros(count), level)


def enough(test: str, losses: Losses, limit: float, level: float) -> int | None:
    """How many prompts would prove `limit` if losses like these went on; None if none do."""
    if losses.mean() >= limit:
        return None
    if test == BETTING:
        return _enough_for_betting(losses, limit, level)
    return prompts_needed(float(losses.mean()), limit, level)


# --- several tests ------------------------------------------------------------------------


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

"""The tests behind a tuning: their numbers, and that they are wrong as seldom as they say."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from vllm_kvcompress.evaluation.tuning import choose as choosing
from vllm_kvcompress.evaluation.tuning.choose import Aim, Choice, Split, choose, split_prompts
from vllm_kvcompress.evaluation.tuning.guarantee import (
    num_rejected,
    p_value,
    prompts_needed,
    smallest_provable,
    upper_bound,
)
from vllm_kvcompress.evaluation.tuning.losses import LossTable

COUNTS = (1, 2, 5, 22, 33, 100)
LIMITS = (0.02, 0.05, 0.1, 0.3, 0.5, 0.9)

# --- numbers ------------------------------------------------------------------------------


def binomial_at_most(most: int, count: int, chance: Fraction) -> float:
    return float(
        sum(math.comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(most + 1))
    )


def test_without_loss_only_the_draws_count() -> None:
    assert p_value(0, 10, 0.1) == pytest.approx(0.9**10)


def test_bentkus_where_it_is_smaller() -> None:
    # P(Bin(100, 0.1) <= 2) is 0.00194488; Hoeffding's part is exp(-5.12657) = 0.00593.
    assert p_value(2, 100, 0.1) == pytest.approx(math.e * 0.0019448847, rel=1e-6)


def test_hoeffding_where_it_is_smaller() -> None:
    exponent = 0.025 * math.log(0.025 / 0.1) + 0.975 * math.log(0.975 / 0.9)
    assert p_value(1, 40, 0.1) == pytest.approx(math.exp(-40 * exponent), rel=1e-9)
    assert math.exp(-40 * exponent) < math.e * binomial_at_most(1, 40, Fraction(1, 10))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("tenths", [1, 3, 5, 9])
def test_p_values_are_the_formula(count: int, tenths: int) -> None:
    limit = tenths / 10
    for total in range(count + 1):
        mean = min(total / count, limit)
        first = mean * math.log(mean / limit) if mean else 0.0
        rest = (1 - mean) * math.log((1 - mean) / (1 - limit))
        bentkus = math.e * binomial_at_most(total, count, Fraction(tenths, 10))
        expected = min(math.exp(-count * (first + rest)), bentkus, 1.0)
        assert p_value(total, count, limit) == pytest.approx(expected, rel=1e-9)


def test_a_rounded_sum_is_not_one_loss_more() -> None:
    assert p_value(0.1 + 0.2 + 0.7 + 1 + 1, 60, 0.2) == p_value(3, 60, 0.2)
    assert p_value(3.01, 60, 0.2) > p_value(3, 60, 0.2)


# --- how often they are wrong -------------------------------------------------------------


def chance_of(values: list[float], chances: np.ndarray, level: float) -> float:
    return float(sum(c for v, c in zip(values, chances, strict=True) if v <= level))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("limit", LIMITS)
def test_losses_of_0_and_1_give_small_p_values_seldom(count: int, limit: float) -> None:
    """All outcomes of a setting whose loss is the limit, the hardest case: P(p <= u) <= u."""
    values = [p_value(total, count, limit) for total in range(count + 1)]
    chances = np.array(
        [math.comb(count, k) * limit**k * (1 - limit) ** (count - k) for k in range(count + 1)]
    )
    for level in [*values, 0.01, 0.05, 0.1, 0.2]:
        assert chance_of(values, chances, level) <= level + 1e-12


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("count", [2, 8, 40])
def test_losses_in_between_do_too(seed: int, count: int) -> None:
    """Sums of losses in quarters, whose exact distribution is a convolution."""
    rng = np.random.default_rng(seed)
    quarters = rng.dirichlet(np.full(5, 0.4))
    limit = float(quarters @ np.arange(5) / 4)  # the setting's true mean loss
    chances = np.ones(1)
    for _ in range(count):
        chances = np.convolve(chances, quarters)
    values = [p_value(place / 4, count, limit) for place in range(len(chances))]
    for level in [*values, 0.01, 0.05, 0.1, 0.2]:
        assert chance_of(values, chances, level) <= level + 1e-12


def test_a_sharper_formula_would_be_caught() -> None:
    """The same check refuses a p-value that leaves Hoeffding's and Bentkus's slack out."""
    count, limit = 33, 0.1
    values = [p_value(total, count, limit) / 3 for total in range(count + 1)]
    chances = np.array(
        [math.comb(count, k) * limit**k * (1 - limit) ** (count - k) for k in range(count + 1)]
    )
    assert any(chance_of(values, chances, level) > level + 1e-12 for level in values)


@pytest.mark.parametrize("count", [5, 33, 100])
def test_bounds_cover_as_often_as_they_say(count: int) -> None:
    for rate in (0.03, 0.1, 0.4, 0.8):
        chances = [math.comb(count, k) * rate**k * (1 - rate) ** (count - k) for k in range(count)]
        missed = sum(c for k, c in enumerate(chances) if upper_bound(k, count, 0.1) < rate)
        assert missed <= 0.1


# --- directions ---------------------------------------------------------------------------


def test_p_values_fall_with_the_limit_and_rise_with_the_loss() -> None:
    limits = np.linspace(0.01, 0.99, 60)
    for total in (0, 0.5, 3, 11.25, 30):
        values = [p_value(total, 30, limit) for limit in limits]
        assert all(a >= b - 1e-12 for a, b in zip(values, values[1:], strict=False))
    for limit in limits:
        values = [p_value(total, 30, limit) for total in np.linspace(0, 30, 61)]
        assert all(a <= b + 1e-12 for a, b in zip(values, values[1:], strict=False))


def test_a_bound_is_at_most_the_limit_where_the_test_rejects() -> None:
    for total in np.linspace(0, 50, 41):
        bound = upper_bound(total, 50, 0.1)
        assert total / 50 <= bound <= 1
        for limit in (0.05, 0.1, 0.2, 0.5, 0.8):
            assert (p_value(total, 50, limit) <= 0.1) == (bound <= limit)


def test_bounds_fall_with_more_prompts_and_less_confidence() -> None:
    bounds = [upper_bound(0.05 * count, count, 0.1) for count in (20, 40, 80, 160, 1000)]
    assert bounds == sorted(bounds, reverse=True) and bounds[-1] < 0.08
    assert upper_bound(2, 40, 0.2) < upper_bound(2, 40, 0.1) < upper_bound(2, 40, 0.01)


def test_what_prompts_without_loss_show() -> None:
    assert smallest_provable(22, 0.1) == pytest.approx(1 - 0.1 ** (1 / 22))
    for count in COUNTS:
        assert upper_bound(0, count, 0.1) == pytest.approx(smallest_provable(count, 0.1))


def test_prompts_needed_are_enough() -> None:
    assert prompts_needed(0.0, 0.1, 0.1) == 22  # 0.9**22 = 0.098
    assert prompts_needed(0.1, 0.1, 0.1) is None and prompts_needed(0.3, 0.1, 0.1) is None
    for mean in (0.0, 0.01, 0.05, 0.09):
        count = prompts_needed(mean, 0.1, 0.03)
        assert count is not None and p_value(mean * count, count, 0.1) <= 0.03


def test_a_sequence_ends_at_the_first_that_stands() -> None:
    assert num_rejected([0.01, 0.1, 0.2, 0.01], 0.1) == 2
    assert num_rejected([0.2, 0.0], 0.1) == 0 and num_rejected([], 0.1) == 0


# --- many settings ------------------------------------------------------------------------

NUM_PROMPTS, NUM_CHAINS, TRIALS = 60, 40, 300
AIM = Aim(limit=0.3, level=0.1)
TOLERATED = AIM.level + 3 * math.sqrt(AIM.level * (1 - AIM.level) / TRIALS)
CHAINS = [[3 * chain, 3 * chain + 1, 3 * chain + 2] for chain in range(NUM_CHAINS)]
Chooser = Callable[[LossTable, Split], Choice]


def losses_of(rng: np.random.Generator, rates: np.ndarray, shared: float) -> np.ndarray:
    """0/1 losses [prompts, settings] of these means; settings of a chain go together, and
    chains do as far as prompts are hard for all of them."""
    hardness = rng.normal(size=(NUM_PROMPTS, 1))
    of_chain = rng.normal(size=(NUM_PROMPTS, NUM_CHAINS))
    latent = math.sqrt(shared) * hardness + math.sqrt(1 - shared) * of_chain
    uniform = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)))(latent)
    return (np.repeat(uniform, 3, axis=1) < rates).astype(float)


def error_rate(chooser: Chooser, rates: np.ndarray, shared: float) -> float:
    """Share of trials in which any setting qualifies whose mean loss is above the limit."""
    rng, errors = np.random.default_rng(1), 0
    kept = np.tile([0.5, 0.25, 0.12], NUM_CHAINS)
    for trial in range(TRIALS):
        losses = losses_of(rng, rates, shared)
        table = LossTable(losses, np.tile(kept, (NUM_PROMPTS, 1)), np.full(NUM_PROMPTS, 600))
        choice = chooser(table, split_prompts(NUM_PROMPTS, trial))
        qualified = [t.setting for tests in choice.chains for t in tests if t.is_rejected]
        errors += any(rates[setting] > AIM.limit for setting in qualified)
    return errors / TRIALS


def right(table: LossTable, split: Split) -> Choice:
    return choose(table, CHAINS, split, AIM)


ALL_BAD = np.tile([0.301, 0.32, 0.35], NUM_CHAINS)
HEADS_GOOD = np.tile([0.05, 0.301, 0.35], NUM_CHAINS)


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("rates", [ALL_BAD, HEADS_GOOD], ids=["all bad", "heads good"])
def test_bad_settings_qualify_as_seldom_as_promised(rates: np.ndarray, shared: float) -> None:
    assert error_rate(right, rates, shared) <= TOLERATED


def test_and_with_many_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "num_chains", lambda count, aim: NUM_CHAINS)
    for rates in (ALL_BAD, HEADS_GOOD):
        assert error_rate(right, rates, 0.0) <= TOLERATED


def test_without_bonferroni_they_would_qualify_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "num_chains", lambda count, aim: NUM_CHAINS)

    def broken(table: LossTable, split: Split) -> Choice:
        return choose(table, CHAINS, split, Aim(AIM.limit, AIM.level * NUM_CHAINS))

    assert error_rate(broken, ALL_BAD, 0.0) > TOLERATED


def test_chains_chosen_by_the_test_prompts_would_too() -> None:
    def broken(table: LossTable, split: Split) -> Choice:
        mixed = Split(split.calibration, split.calibration, split.held_out)
        return choose(table, CHAINS, mixed, AIM)

    assert error_rate(broken, ALL_BAD, 0.0) > TOLERATED


def test_good_settings_are_found() -> None:
    """Not by never choosing anything: chains of small losses qualify down to their cheapest."""
    rates = np.tile([0.301, 0.32, 0.35], NUM_CHAINS)
    rates[9:12] = 0.02, 0.03, 0.04
    rng, found = np.random.default_rng(0), []
    kept = np.tile([0.5, 0.25, 0.12], NUM_CHAINS)
    for trial in range(20):
        losses = losses_of(rng, rates, 0.3)
        table = LossTable(losses, np.tile(kept, (NUM_PROMPTS, 1)), np.full(NUM_PROMPTS, 600))
        chosen = right(table, split_prompts(NUM_PROMPTS, trial)).chosen
        found.append(None if chosen is None else chosen.setting)
    assert set(found) <= {9, 10, 11} and found.count(11) > 15

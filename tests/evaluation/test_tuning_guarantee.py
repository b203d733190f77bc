"""The tests behind a tuning: their numbers, and that they are wrong as seldom as they say."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from vllm_kvcompress.evaluation.tuning import choose as choosing
from vllm_kvcompress.evaluation.tuning.choose import Aim, Choice, Split, choose, split_prompts
from vllm_kvcompress.evaluation.tuning.guarantee import (
    BETTING,
    HOEFFDING_BENTKUS,
    TESTS,
    betting_p_value,
    bound_of,
    enough,
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


def money_after(losses: list[float], limit: float, level: float) -> list[float]:
    """The gambler's money, loss by loss, straight from the paper's formulas."""
    money, found, seen = 1.0, [], []
    spread = 0.25
    for place, loss in enumerate(losses):
        stake = min(1.0, math.sqrt(2 * math.log(1 / level) / (len(losses) * spread)))
        money *= 1 - stake * (loss - limit)
        found.append(money)
        seen.append((loss - (0.5 + sum(losses[: place + 1])) / (place + 2)) ** 2)
        spread = (0.25 + sum(seen)) / (place + 2)
    return found


def test_betting_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 10, 50):
        losses = rng.beta(0.5, 4, count)
        for limit, level in ((0.05, 0.1), (0.2, 0.03), (0.6, 0.3)):
            expected = min(1.0, 1 / max(money_after(losses.tolist(), limit, level)))
            assert betting_p_value(losses, limit, level) == pytest.approx(expected)


@pytest.mark.parametrize("chance", [0.05, 0.1, 0.4])
def test_betting_gives_small_p_values_seldom(chance: float) -> None:
    """All 4,096 orders of twelve losses of 0 and 1, whose mean is the limit."""
    outcomes = np.array(list(np.ndindex(*[2] * 12)), dtype=float)
    ones = outcomes.sum(axis=1)
    chances = chance**ones * (1 - chance) ** (12 - ones)
    for tuned_for in (0.03, 0.1, 0.3):
        values = [betting_p_value(row, chance, tuned_for) for row in outcomes]
        for level in (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9):
            assert chance_of(values, chances, level) <= level + 1e-12


def test_betting_gives_small_p_values_seldom_for_losses_in_between() -> None:
    rng, trials = np.random.default_rng(2), 4000
    for first, second in ((0.1, 0.9), (1, 9), (20, 180)):
        losses = rng.beta(first, second, (trials, 40))
        values = np.array([betting_p_value(row, 0.1, 0.1) for row in losses])
        for level in (0.05, 0.1, 0.3):
            tolerated = level + 3 * math.sqrt(level * (1 - level) / trials)
            assert (values <= level).mean() <= tolerated


def test_betting_needs_fewer_prompts_where_losses_hardly_differ() -> None:
    losses = np.tile([0.0, 0.03125, 0.0625], 12)
    assert betting_p_value(losses, 0.1, 0.1) < 0.1 < p_value(float(losses.sum()), 36, 0.1)
    for test in TESTS:
        count = enough(test, losses, 0.05, 0.1)
        assert count is not None and count > 36
        repeated = np.resize(losses, count)
        assert bound_of(test, repeated, 0.1) < 0.06
        assert enough(test, losses, 0.03, 0.1) is None
    assert enough(BETTING, losses, 0.05, 0.1) < enough(HOEFFDING_BENTKUS, losses, 0.05, 0.1)


@pytest.mark.parametrize("seed", range(5))
def test_betting_bounds_are_where_its_tests_reject(seed: int) -> None:
    losses = np.random.default_rng(seed).beta(0.3, 3, 40)
    bound = bound_of(BETTING, losses, 0.1)
    limits = np.linspace(0.01, 0.99, 99)
    values = [betting_p_value(losses, limit, 0.1) for limit in limits]
    assert values == sorted(values, reverse=True)
    assert [v <= 0.1 for v in values] == [bound <= limit for limit in limits]


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
    for count in COUNTS:
        best = smallest_provable(HOEFFDING_BENTKUS, count, 0.1)
        assert best == pytest.approx(1 - 0.1 ** (1 / count))
        # All is staked from the second or third prompt on: (1 + r) ** -count is 0.1.
        least = min(0.1 ** (-1 / count) - 1, 1.0)
        assert least * 0.999 <= smallest_provable(BETTING, count, 0.1) <= max(1.2 * least, 0.05)


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


def right(table: LossTable, split: Split, aim: Aim = AIM) -> Choice:
    return choose(table, CHAINS, split, aim, with_bounds=False)


def betting(table: LossTable, split: Split) -> Choice:
    return right(table, split, Aim(AIM.limit, AIM.level, BETTING))


ALL_BAD = np.tile([0.301, 0.32, 0.35], NUM_CHAINS)
HEADS_GOOD = np.tile([0.05, 0.301, 0.35], NUM_CHAINS)


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("rates", [ALL_BAD, HEADS_GOOD], ids=["all bad", "heads good"])
def test_bad_settings_qualify_as_seldom_as_promised(rates: np.ndarray, shared: float) -> None:
    assert error_rate(right, rates, shared) <= TOLERATED
    assert error_rate(betting, rates, shared) <= TOLERATED


def test_and_with_many_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "num_chains", lambda count, aim: NUM_CHAINS)
    for rates in (ALL_BAD, HEADS_GOOD):
        assert error_rate(right, rates, 0.0) <= TOLERATED
        assert error_rate(betting, rates, 0.0) <= TOLERATED


def test_without_bonferroni_they_would_qualify_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "num_chains", lambda count, aim: NUM_CHAINS)

    def broken(table: LossTable, split: Split) -> Choice:
        return right(table, split, Aim(AIM.limit, AIM.level * NUM_CHAINS))

    assert error_rate(broken, ALL_BAD, 0.0) > TOLERATED


def test_chains_chosen_by_the_test_prompts_would_too() -> None:
    def broken(table: LossTable, split: Split) -> Choice:
        mixed = Split(split.calibration, split.calibration, split.held_out)
        return right(table, mixed)

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

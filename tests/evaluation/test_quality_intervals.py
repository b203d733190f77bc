"""Intervals of the report of `kvcompress eval`."""

import math

import numpy as np
import pytest

from vllm_kvcompress.evaluation.quality.intervals import (
    Interval,
    bootstrap,
    mean_interval,
    mean_of_parts,
    newcombe,
    paired_interval,
    wilson,
)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [  # Newcombe (1998), Stat. Med. 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_is_the_textbooks(right: int, total: int, low: float, high: float) -> None:
    found = wilson(right, total)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    mirrored = wilson(total - right, total)
    assert mirrored.low == pytest.approx(1 - found.high)
    assert mirrored.high == pytest.approx(1 - found.low)
    scores = [1.0] * right + [0.0] * (total - right)
    assert mean_interval(scores) == found


def test_all_right_leaves_room_for_wrong_ones() -> None:
    assert wilson(10, 10).high == 1.0
    assert wilson(10, 10).low == pytest.approx(10 / (10 + 1.959964**2))


def test_newcombe_by_hand() -> None:
    # 14 both, 5 and 0 in one only, 22 neither. Wilson of 19 and of 14 in 41; phi is the
    # correlation with 41 / 2 taken off the product.
    one, other = wilson(19, 41), wilson(14, 41)
    phi = (14 * 22 - 5 * 0 - 41 / 2) / math.sqrt(19 * 22 * 14 * 27)
    down, up = 19 / 41 - one.low, other.high - 14 / 41
    low = 5 / 41 - math.sqrt(down**2 - 2 * phi * down * up + up**2)
    found = newcombe(14, 5, 0, 22)
    assert found.low == pytest.approx(low)
    assert (round(found.low, 3), round(found.high, 3)) == (0.011, 0.226)
    swapped = newcombe(14, 0, 5, 22)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))


def test_no_difference_seen_is_no_proof_of_none() -> None:
    """All samples right under both: the interval narrows with their number, it never closes."""
    few, many = (paired_interval([1.0] * n, [1.0] * n) for n in (10, 1000))
    assert few.low < -0.2 and few.high > 0.2
    assert -0.01 < many.low < 0 < many.high < 0.01
    alike = paired_interval([0.4, 0.7] * 10, [0.4, 0.7] * 10)
    assert alike.low == pytest.approx(-wilson(0, 20).high)
    assert alike.high == pytest.approx(wilson(0, 20).high)


def test_paired_is_narrower_than_unpaired_where_samples_agree() -> None:
    baseline = [1.0] * 30 + [0.0] * 30
    scores = [1.0] * 27 + [0.0] * 33
    paired, apart = paired_interval(scores, baseline), paired_interval(scores[::-1], baseline)
    assert paired.high - paired.low < 0.7 * (apart.high - apart.low)
    assert paired.low < -0.05 < paired.high


@pytest.mark.parametrize("count", [8, 40])
def test_bootstrap_covers_the_mean(count: int) -> None:
    generator = np.random.default_rng(7)
    truth, tries, hits = 2 / 5, 400, 0
    for _ in range(tries):
        found = mean_interval(generator.beta(2, 3, count).tolist())
        hits += found.low <= truth <= found.high
    # Three standard deviations of a count of 400 at 95 % are 3.3 %.
    assert 0.917 <= hits / tries <= 0.983


def test_paired_bootstrap_covers_the_difference() -> None:
    generator = np.random.default_rng(8)
    tries, hits = 300, 0
    for _ in range(tries):
        base = generator.uniform(0.2, 1.0, 25)
        shift = generator.uniform(0.0, 0.2, 25)
        found = paired_interval((base - shift).tolist(), base.tolist())
        hits += found.low <= -0.1 <= found.high
    assert 0.912 <= hits / tries <= 0.988


def test_newcombe_covers_the_difference() -> None:
    generator = np.random.default_rng(9)
    table = [0.5, 0.05, 0.25, 0.2]  # both, first, second, neither
    tables = generator.multinomial(40, table, 1000)
    found = [newcombe(*map(int, each)) for each in tables]
    hits = sum(each.low <= -0.2 <= each.high for each in found)
    assert 0.93 <= hits / 1000 <= 0.98


def test_bootstrap_is_the_same_every_time_and_stays_on_the_scale() -> None:
    values = [0.1, 0.9, 0.4, 0.35, 1.0]
    assert bootstrap(values) == bootstrap(values)
    assert 0.1 <= bootstrap(values).low < np.mean(values) < bootstrap(values).high <= 1.0
    one = bootstrap([0.5])
    assert 0 <= one.low < 0.2 and 0.8 < one.high <= 1


def test_mean_of_parts_adds_squares() -> None:
    parts = [Interval(0.5, 0.9), Interval(0.1, 0.4)]
    found = mean_of_parts([0.8, 0.2], parts)
    assert found.low == pytest.approx(0.5 - math.hypot(0.3, 0.1) / 2)
    assert found.high == pytest.approx(0.5 + math.hypot(0.1, 0.2) / 2)

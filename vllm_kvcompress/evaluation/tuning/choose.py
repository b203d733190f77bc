"""From losses to a setting: screen on one part of the prompts, test on a second, check on a third.

The parts are disjoint and drawn at random. The first chooses which chains are tested and the
second tests them, so that the tests know nothing of the choice; the third is only reported.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_kvcompress.evaluation.tuning.grid import Candidate
from vllm_kvcompress.evaluation.tuning.guarantee import (
    HOEFFDING_BENTKUS,
    Losses,
    bound_of,
    num_rejected,
    p_of,
)
from vllm_kvcompress.evaluation.tuning.losses import LossTable

SCREENING, HELD_OUT = 0.2, 0.2
"""Shares of the prompts; the rest, which the guarantee rests on, is for the tests."""
FEWEST_PROMPTS = 5
MOST_CHAINS = 3
_HOPED = 0.25  # see `num_chains`
_LEAST = 1e-12  # evidence beyond it does not count


@dataclass(frozen=True)
class Split:
    """Numbers of the prompts of each part."""

    screening: npt.NDArray[np.int64]
    calibration: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.int64]


def calibration_size(num_prompts: int) -> int:
    """Prompts that the tests get."""
    return num_prompts - sum(_part(num_prompts, share) for share in (SCREENING, HELD_OUT))


def _part(num_prompts: int, share: float) -> int:
    return max(1, round(share * num_prompts))


def split_prompts(num_prompts: int, seed: int, number: int = 0) -> Split:
    """Split number `number` of a seed; at least `FEWEST_PROMPTS`."""
    order = np.random.default_rng([seed, number]).permutation(num_prompts)
    first = _part(num_prompts, SCREENING)
    second = first + calibration_size(num_prompts)
    return Split(order[:first], order[first:second], order[second:])


def make_chains(candidates: Sequence[Candidate]) -> list[list[int]]:
    """Numbers of each chain's settings in the order of their tests: falling budget."""
    chains: dict[str, list[int]] = {}
    for index, candidate in enumerate(candidates):
        chains.setdefault(candidate.chain, []).append(index)
    return [sorted(each, key=lambda i: -candidates[i].budget) for each in chains.values()]


@dataclass(frozen=True)
class Aim:
    """What is to be shown.

    Attributes
    ----------
    limit : float
        Largest allowed mean loss, 1 - target.
    level : float
        Largest allowed probability of choosing a setting of a larger one, 1 - confidence.
    test : str
        One of `guarantee.TESTS`.
    """

    limit: float
    level: float
    test: str = HOEFFDING_BENTKUS


@dataclass(frozen=True)
class Tested:
    """One hypothesis, "this setting's mean loss is above the limit", on the calibration prompts.

    Attributes
    ----------
    setting : int
        Number of the setting.
    screened : float
        Mean loss of the screening prompts.
    mean : float
        Mean loss of the calibration prompts.
    level, p_value : float
        Of the test, see `guarantee.p_of`.
    bound : float
        See `guarantee.bound_of`, at this level. It is at most the limit exactly where the test
        rejects. As a bound it holds for one setting that was fixed beforehand; what holds for the
        chosen one is the limit.
    is_rejected : bool
        Whether the setting qualifies: its test and all before it in the chain reject.
    """

    setting: int
    screened: float
    mean: float
    level: float
    p_value: float
    bound: float
    is_rejected: bool


@dataclass(frozen=True)
class Choice:
    """What one split gives.

    Attributes
    ----------
    split : Split
        Of the prompts.
    level : float
        Of each chain's tests.
    chains : list[list[Tested]]
        The chains that were tested, most promising first.
    chosen : Tested or None
        Of the cheapest setting that qualifies.
    """

    split: Split
    level: float
    chains: list[list[Tested]]
    chosen: Tested | None

    @property
    def closest(self) -> Tested:
        """Of the tests that ended their chains, the one with the smallest p-value."""
        ends = [next((t for t in tests if not t.is_rejected), tests[-1]) for tests in self.chains]
        return min(ends, key=lambda test: test.p_value)


def num_chains(count: int, aim: Aim) -> int:
    """How many chains `count` calibration prompts can afford, at most `MOST_CHAINS`.

    Every chain makes all tests stricter. A setting of a quarter of the allowed loss should pass;
    where not even one chain allows that, one is tested.
    """
    hoped = np.full(count, _HOPED * aim.limit)
    for number in range(MOST_CHAINS, 1, -1):
        level = aim.level / number
        if p_of(aim.test, hoped, aim.limit, level) <= level:
            return number
    return 1


def choose(
    table: LossTable,
    chains: Sequence[list[int]],
    split: Split,
    aim: Aim,
    with_bounds: bool = True,
) -> Choice:
    """Screen, test, choose.

    Parameters
    ----------
    table : LossTable
        All losses.
    chains : sequence of list[int]
        From `make_chains`; at least one.
    split, aim
        See there.
    with_bounds : bool
        Whether bounds are worked out, which takes most of the time; else they are NaN.
    """
    most = min(num_chains(len(split.calibration), aim), len(chains))
    level = aim.level / most
    tested = [
        _test_chain(table, chain, split, aim, level, with_bounds)
        for chain in _screen(table, chains, split, aim, level)[:most]
    ]
    qualified = [
        test
        for tests in tested
        for test in tests
        if test.is_rejected and table.costs[test.setting] < 1
    ]
    chosen = min(qualified, key=lambda t: (table.costs[t.setting], t.p_value), default=None)
    return Choice(split, level, tested, chosen)


def _screen(
    table: LossTable, chains: Sequence[list[int]], split: Split, aim: Aim, level: float
) -> list[list[int]]:
    """Chains by what the screening prompts promise, best first.

    Every setting's p-value is worked out as if the calibration prompts repeated the screening
    ones. The chain counts by the evidence -log(p) of all its settings, each weighted by the share
    of the cache that it frees. (How far a chain would get is no good measure: of a dozen prompts,
    one decides where it ends.)
    """
    # Not the costs of all prompts: lengths tell of losses, and the tests must not be chosen by
    # anything of the calibration prompts.
    costs = table.kept[split.screening].mean(axis=0)

    def promise(chain: list[int]) -> float:
        found = 0.0
        for setting in chain:
            repeated = np.resize(table.losses[split.screening, setting], len(split.calibration))
            value = p_of(aim.test, repeated, aim.limit, level)
            found -= math.log(max(value, _LEAST)) * (1 - costs[setting])
        return float(found)

    # A setting that frees nothing of the screening prompts needs no test.
    saving = [[i for i in chain if costs[i] < 1] or chain for chain in chains]
    return sorted(saving, key=promise, reverse=True)


def _test_chain(
    table: LossTable, chain: list[int], split: Split, aim: Aim, level: float, with_bounds: bool
) -> list[Tested]:
    columns: list[Losses] = [table.losses[split.calibration, i] for i in chain]
    values = [p_of(aim.test, losses, aim.limit, level) for losses in columns]
    rejected = num_rejected(values, level)
    return [
        Tested(
            setting=setting,
            screened=float(table.losses[split.screening, setting].mean()),
            mean=float(losses.mean()),
            level=level,
            p_value=value,
            bound=bound_of(aim.test, losses, level) if with_bounds else math.nan,
            is_rejected=place < rejected,
        )
        for place, (setting, losses, value) in enumerate(zip(chain, columns, values, strict=True))
    ]


# --- other splits -------------------------------------------------------------------------


@dataclass(frozen=True)
class Repetition:
    """What another split of the same losses would have given.

    Attributes
    ----------
    setting : int or None
        The chosen setting; None where none qualified.
    cost, held_out_loss : float
        Of the chosen setting; 1 and 0 where none qualified, because the whole cache stays.
    """

    setting: int | None
    cost: float
    held_out_loss: float


def repeat(
    table: LossTable, chains: Sequence[list[int]], aim: Aim, seed: int, count: int
) -> Iterator[Repetition]:
    """Choose on splits 1 to `count` of a seed."""
    for number in range(1, count + 1):
        split = split_prompts(len(table.losses), seed, number)
        chosen = choose(table, chains, split, aim, with_bounds=False).chosen
        if chosen is None:
            yield Repetition(None, 1.0, 0.0)
            continue
        loss = float(table.losses[split.held_out, chosen.setting].mean())
        yield Repetition(chosen.setting, float(table.costs[chosen.setting]), loss)

"""What a tuning found: a setting as YAML, a summary for programs, sentences for people."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import yaml

from vllm_kvcompress.evaluation.quality.intervals import Interval, mean_interval
from vllm_kvcompress.evaluation.tuning.choose import (
    FEWEST_PROMPTS,
    Aim,
    Choice,
    Repetition,
    Tested,
    calibration_size,
)
from vllm_kvcompress.evaluation.tuning.grid import Candidate
from vllm_kvcompress.evaluation.tuning.guarantee import enough, smallest_provable
from vllm_kvcompress.evaluation.tuning.losses import LossTable

FEW_PROMPTS = 30


@dataclass(frozen=True)
class HeldOut:
    """The chosen setting on prompts that neither chose nor tested it.

    Attributes
    ----------
    count : int
        Prompts.
    agreement : float
        Mean of 1 - loss.
    interval : Interval
        Of this mean, 95 %.
    """

    count: int
    agreement: float
    interval: Interval


@dataclass(frozen=True)
class Tuning:
    """Everything that is reported.

    Attributes
    ----------
    candidates, table
        Settings and their losses.
    aim : Aim
        What was to be shown.
    choice : Choice
        Of the split that counts.
    repetitions : list[Repetition]
        Of other splits.
    about : dict
        Model, prompts, command, versions and date; plain values.
    """

    candidates: Sequence[Candidate]
    table: LossTable
    aim: Aim
    choice: Choice
    repetitions: list[Repetition]
    about: dict[str, Any]

    @property
    def chosen(self) -> Candidate | None:
        """The cheapest setting that qualifies."""
        chosen = self.choice.chosen
        return None if chosen is None else self.candidates[chosen.setting]

    @property
    def held_out(self) -> HeldOut | None:
        """None where nothing was chosen."""
        chosen = self.choice.chosen
        if chosen is None:
            return None
        scores = (1 - self.table.losses[self.choice.split.held_out, chosen.setting]).tolist()
        return HeldOut(len(scores), sum(scores) / len(scores), mean_interval(scores))


def best_provable(num_prompts: int, aim: Aim) -> str | None:
    """A sentence where prompts are few or cannot show what is wanted; None elsewhere."""
    count = calibration_size(num_prompts)
    best = smallest_provable(aim.test, count, aim.level)
    if num_prompts >= FEW_PROMPTS and best <= aim.limit:
        return None
    text = (
        f"of {num_prompts} prompts {count} are left for the test, and even without any loss they "
        f"show a mean of at least {_floor(1 - best)} at confidence {1 - aim.level:g}, and no more"
    )
    if best <= aim.limit:
        return f"{text}."
    total = _in_all(enough(aim.test, np.zeros(1), aim.limit, aim.level))
    return f"{text}: the target {1 - aim.limit:g} takes {total} prompts or more."


def _in_all(needed: int | None) -> int | None:
    """Prompts of which so many are left for the test."""
    if needed is None:
        return None
    total = max(needed + 2, FEWEST_PROMPTS)
    while calibration_size(total) < needed:
        total += 1
    return total


def _floor(value: float) -> str:
    """Three digits, never more than the value."""
    return f"{np.floor(value * 1000) / 1000:.3f}"


def why_none(tuning: Tuning) -> str:
    """What came closest, where no setting qualifies, and what would help."""
    test, aim = tuning.choice.closest, tuning.aim
    name = tuning.candidates[test.setting].name
    count = len(tuning.choice.split.calibration)
    text = (
        f"no setting qualifies. Closest is {name}, which keeps "
        f"{tuning.table.costs[test.setting]:.1%} of the cache: its mean loss on {count} test "
        f"prompts is {test.mean:.4f}, which shows a mean loss of at most {test.bound:.4f}; allowed "
        f"is {aim.limit:g}."
    )
    losses = tuning.table.losses[tuning.choice.split.calibration, test.setting]
    total = _in_all(enough(aim.test, losses, aim.limit, tuning.choice.level))
    if total is None:
        return f"{text} More prompts would not help; a lower target, or larger budgets, would."
    return (
        f"{text} If losses stay what they are, {total} prompts are enough to show it. Trying one "
        "--seed after the other until a setting qualifies would void the promise."
    )


# --- for the server -----------------------------------------------------------------------


def setting_yaml(tuning: Tuning) -> str:
    """The chosen setting, with where it comes from in comments."""
    candidate, test, held = tuning.chosen, tuning.choice.chosen, tuning.held_out
    assert candidate is not None and test is not None and held is not None
    aim, about = tuning.aim, tuning.about
    lines = [
        f"Chosen by kvcompress tune on {about['date']}: {candidate.name}, which keeps "
        f"{tuning.table.costs[test.setting]:.1%} of the cache of the prompts given.",
        f"Model: {about['model']}. Prompts: {len(tuning.table.losses)} of {about['prompts']}, "
        f"{tuning.table.lengths.min()} to {tuning.table.lengths.max()} tokens. "
        f"Measure: {about['measure']}, {about['tokens']} tokens.",
        f"Promised, for prompts drawn like these: mean {about['measure']} of at least "
        f"{1 - aim.limit:g}, at confidence {1 - aim.level:g}.",
        f"Test: mean loss {test.mean:.4f} on {len(tuning.choice.split.calibration)} prompts, "
        f"bound {test.bound:.4f} ({aim.test}, level {tuning.choice.level:.4g}).",
        f"Held out: {held.agreement:.4f} on {held.count} prompts, 95 % interval "
        f"{held.interval.low:.4f} to {held.interval.high:.4f}.",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in about["measured_with"].items()) + ".",
        f"Command: {about['command']}",
    ]
    comments = "".join(f"# {_one_line(line)}\n" for line in lines)
    fields = candidate.config.to_dict()
    return comments + yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _one_line(text: str) -> str:
    """Text that stays a comment, whatever a folder is called."""
    return text if text.isprintable() else repr(text)[1:-1]


# --- for programs -------------------------------------------------------------------------


def summary(tuning: Tuning) -> dict[str, Any]:
    """Everything but the single losses, as plain values."""
    choice, table, held = tuning.choice, tuning.table, tuning.held_out
    parts = {
        name: getattr(choice.split, name).tolist()
        for name in ("screening", "calibration", "held_out")
    }
    return {
        **tuning.about,
        "num_prompts": len(table.losses),
        "target": 1 - tuning.aim.limit,
        "confidence": 1 - tuning.aim.level,
        "test": tuning.aim.test,
        "level_per_chain": choice.level,
        "chosen": None if choice.chosen is None else _test(tuning, choice.chosen),
        "closest": _test(tuning, choice.closest) if choice.chosen is None else None,
        "held_out": None if held is None else asdict(held),
        "chains": [[_test(tuning, test) for test in tests] for tests in choice.chains],
        "repetitions": _repeated(tuning),
        "settings": [
            {"name": c.name, "digest": c.digest, "kept": float(cost), "mean_loss": float(loss)}
            for c, cost, loss in zip(
                tuning.candidates, table.costs, table.losses.mean(axis=0), strict=True
            )
        ],
        "split": parts,
    }


def _test(tuning: Tuning, test: Tested) -> dict[str, Any]:
    name = tuning.candidates[test.setting].name
    cost = float(tuning.table.costs[test.setting])
    return {"name": name, "kept": cost, **asdict(test)}


def _repeated(tuning: Tuning) -> dict[str, Any]:
    found = [each for each in tuning.repetitions if each.setting is not None]
    costs = [each.cost for each in found]
    names = Counter(tuning.candidates[each.setting].name for each in found)  # type: ignore[index]
    return {
        "splits": len(tuning.repetitions),
        "qualified": len(found),
        "above_limit": sum(each.held_out_loss > tuning.aim.limit for each in found),
        "mean_held_out_loss": float(np.mean([e.held_out_loss for e in found])) if found else None,
        "kept": [float(np.quantile(costs, q)) for q in (0, 0.5, 1)] if costs else None,
        "chosen": dict(names.most_common()),
    }


# --- for people ---------------------------------------------------------------------------


def sentences(tuning: Tuning) -> list[str]:
    """What was promised and what the held-out prompts and other splits say to it."""
    found = []
    test, held, aim = tuning.choice.chosen, tuning.held_out, tuning.aim
    if test is not None and held is not None and tuning.chosen is not None:
        found += [
            f"Chosen: {tuning.chosen.name}, which keeps {tuning.table.costs[test.setting]:.1%} of "
            "the cache.",
            f"Promised for prompts like these: mean {tuning.about['measure']} of at least "
            f"{1 - aim.limit:g}, at confidence {1 - aim.level:g}; this setting's own test bounds "
            f"its loss by {test.bound:.4f}.",
            f"Held out: {held.agreement:.4f} on {held.count} prompts (95 % interval "
            f"{held.interval.low:.4f} to {held.interval.high:.4f}).",
        ]
    again = _repeated(tuning)
    if again["splits"]:
        found.append(_repeated_sentence(again, aim))
    return found


def _repeated_sentence(again: dict[str, Any], aim: Aim) -> str:
    splits, qualified = again["splits"], again["qualified"]
    if not qualified:
        return f"On none of {splits} other splits of the same losses did a setting qualify."
    low, middle, high = again["kept"]
    return (
        f"On {splits} other splits of the same losses a setting qualified {qualified} times, "
        f"keeping {low:.1%} to {high:.1%} of the cache (median {middle:.1%}); the held-out loss, a "
        f"mean of few prompts, was above {aim.limit:g} {again['above_limit']} times and "
        f"{again['mean_held_out_loss']:.4f} on average."
    )

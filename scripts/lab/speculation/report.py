"""What ``scripts/bench_speculation.py`` writes and prints: CSV, conclusions, table and plot."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from lab.speculation.engines import DRAFT, STOCK, VARIANTS
from vllm_kvcompress.speed.drafting import Speculation
from vllm_kvcompress.speed.shapes import ModelShape

UNITS = {
    "tokens_per_second": "output tokens/s",
    "engine_steps": "count",
    "request_steps": "count",
    "decode_tokens": "count",
    "drafts": "count",
    "draft_tokens": "count",
    "accepted_tokens": "count",
    "accepted_length": "tokens per draft",
    "tokens_per_step": "tokens per request and step",
    "step_seconds": "s",
    "pass_seconds": "s",
    "draft_seconds": "s",
    "draft_step_seconds": "s",
    "full_steps": "count",
    "view_share": "share of the prompt",
    "equal_tokens": "count",
    "prompt_tokens_computed": "count",
}
"""Metric to unit, as in the CSV."""

INTERPRETER = (
    "Times are of Triton's interpreter on a CPU, where a pass costs what its kernel launches cost: "
    "they say nothing about a GPU. Counts (steps, accepted tokens) are exact."
)


@dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes
    ----------
    batch, round : int
        Requests; from 1.
    variant, metric : str
        One of `VARIANTS`; a key of `UNITS`.
    value : float
        In the metric's unit.
    """

    batch: int
    round: int
    variant: str
    metric: str
    value: float


Values = dict[tuple[int, str, str], list[float]]
"""(batch, variant, metric) to one value per round."""


class CsvLog:
    """Long-format CSV that grows with every measurement: a run that fails keeps what it had.

    Parameters
    ----------
    path : Path
        File to write.
    about : mapping
        Where the numbers come from; the first line, as JSON behind "# ".

    Attributes
    ----------
    values : Values
        All that was written, unrounded.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.values: Values = {}
        self._file = path.open("w", newline="", encoding="utf-8")
        self._file.write("# " + json.dumps(about) + "\n")
        self._writer = csv.writer(self._file)
        self._writer.writerow(["batch", "round", "variant", "metric", "value", "unit"])

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows and flush."""
        for row in rows:
            self.values.setdefault((row.batch, row.variant, row.metric), []).append(row.value)
            value = f"{row.value:.6g}"
            where = [row.batch, row.round, row.variant]
            self._writer.writerow([*where, row.metric, value, UNITS[row.metric]])
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(frozen=True)
class Sizes:
    """What was run, as far as conclusions depend on it.

    Attributes
    ----------
    batches : sequence of int
        Requests of each batch.
    prompt_len, output_len : int
        Tokens of each request.
    num_drafts : int
        Draft tokens per step.
    view_ratio : float
        Share of the prompt that a view is meant to hold, for where none was measured.
    lengths : mapping
        Variant to the accepted length to judge its times at; None takes the measured one.
    """

    batches: Sequence[int]
    prompt_len: int
    output_len: int
    num_drafts: int
    view_ratio: float
    lengths: Mapping[str, float | None]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest, highest."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def conclude(sizes: Sizes, shape: ModelShape, values: Values) -> list[dict[str, Any]]:
    """Per batch and variant: medians, speed-up measured, and what step times and bytes give.

    `speed_up` is tokens per second over no speculation's, `step_ratio` this variant's step over the
    plain one, both within a round. `by_steps` is accepted length over `step_ratio`; `by_bytes` is
    the model's speed-up at the same length.

    Parameters
    ----------
    sizes : Sizes
        What was run.
    shape : ModelShape
        Of the measured model.
    values : Values
        Of every batch and variant, with one value per round of each metric.

    Returns
    -------
    list[dict]
        Batches in their order, in each the variants in that of `VARIANTS`. A metric is what
        `spread` returns; without speculation there is no speed-up.
    """
    found = []
    for batch in sizes.batches:
        plain_rates = values[batch, STOCK, "tokens_per_second"]
        plain_steps = values[batch, STOCK, "step_seconds"]
        for variant in VARIANTS:
            entry: dict[str, Any] = {"batch": batch, "variant": variant}
            entry["tokens"] = batch * sizes.output_len
            for (other, name, metric), each in values.items():
                if (other, name) == (batch, variant):
                    entry[metric] = spread(each)
            if variant == STOCK or "accepted_length" not in entry:
                found.append(entry)
                continue
            rates = values[batch, variant, "tokens_per_second"]
            entry["speed_up"] = spread([a / b for a, b in zip(rates, plain_rates, strict=True)])
            given = sizes.lengths[variant]
            length = given or entry["accepted_length"]["median"]
            share = entry.get("view_share", {"median": sizes.view_ratio})["median"]
            tail = sizes.output_len // 2
            case = Speculation(shape, batch, sizes.prompt_len, share, sizes.num_drafts, tail)
            mode = "draft" if variant == DRAFT else "given"
            entry["at_length"] = length
            entry["length_given"] = bool(given)
            steps = values[batch, variant, "step_seconds"]
            cost = spread([mine / plain for mine, plain in zip(steps, plain_steps, strict=True)])
            entry["step_ratio"] = cost
            entry["by_steps"] = length / cost["median"]
            entry["by_bytes"] = case.speed_up(length, mode)
            entry["length_for_2x"] = 2 * cost["median"]
            if variant == DRAFT:
                entry["by_bytes_limit"] = case.limit
                entry["tokens_to_pay"] = case.tokens_to_pay(length)
            found.append(entry)
    return found


def make_table(entries: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One line per batch and variant of what `conclude` found; medians over rounds."""
    columns = ["batch", "variant", "tok/s", "steps", "accepted\nlength", "tokens\nper step"]
    columns += ["ms\nper step", "ms verify\n(or plain)", "ms\ndrafting", "ms per\ndraft step"]
    columns += ["speed-up\nmeasured", "by steps", "by bytes", "equal\ntokens"]
    table = Table(title=title, title_justify="left")
    for column in columns:
        left = column == "variant"
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    formats = {
        "tokens_per_second": "{:.1f}",
        "engine_steps": "{:.0f}",
        "accepted_length": "{:.2f}",
        "tokens_per_step": "{:.2f}",
    }
    for entry in entries:
        cells = [str(entry["batch"]), entry["variant"]]
        cells += [f.format(entry[m]["median"]) if m in entry else "" for m, f in formats.items()]
        for metric in ("step_seconds", "pass_seconds", "draft_seconds", "draft_step_seconds"):
            cells.append(f"{entry[metric]['median'] * 1e3:.1f}" if metric in entry else "")
        rate = entry.get("speed_up")
        cells.append(
            f"{rate['median']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]" if rate else ""
        )
        mark = f" (at {entry['at_length']:g})" if entry.get("length_given") else ""
        cells += [f"{entry[m]:.2f}{mark}" if m in entry else "" for m in ("by_steps", "by_bytes")]
        cells.append(f"{entry['equal_tokens']['low']:.0f} of {entry['tokens']}")
        table.add_row(*cells)
    return table


def target_line(entry: Mapping[str, Any], num_drafts: int) -> str:
    """What the accepted length would have to be for twice the tokens per second."""
    needed, most = entry["length_for_2x"], num_drafts + 1
    out_of_reach = f", more than the {most} there can be" if needed > most else ""
    return (
        f"batch {entry['batch']}, {entry['variant']}: at these step times 2x needs an accepted "
        f"length of {needed:.2f}{out_of_reach}"
    )


def write_plot(path: Path, entries: Sequence[Mapping[str, Any]], title: str) -> None:
    """Tokens per second over no speculation, and what a step's time goes to."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    names = [f"{entry['variant']}\nbatch {entry['batch']}" for entry in entries]
    for index, entry in enumerate(entries):
        rate = entry.get("speed_up", {"median": 1.0, "low": 1.0, "high": 1.0})
        error = [[rate["median"] - rate["low"]], [rate["high"] - rate["median"]]]
        left.bar(index, rate["median"], yerr=error, color=f"C{VARIANTS.index(entry['variant'])}")
        if "by_bytes" in entry:
            left.plot(index, entry["by_bytes"], "k_", ms=18)
        bottom, step = 0.0, entry["step_seconds"]["median"] * 1e3
        target = entry["pass_seconds"]["median"] * 1e3
        drafting = entry.get("draft_seconds", {"median": 0.0})["median"] * 1e3
        parts = (target, drafting, max(step - target - drafting, 0.0))
        for part, color in zip(parts, ("C0", "C1", "0.8"), strict=True):
            right.bar(index, part, bottom=bottom, color=color)
            bottom += part
        length = entry.get("accepted_length", {"median": 1.0})["median"]
        right.text(index, bottom, f"{length:.2f}", ha="center", va="bottom")
    for axes in (left, right):
        axes.set_xticks(range(len(names)), names, fontsize=8)
    left.axhline(1.0, color="0.7", linewidth=0.8)
    left.set_ylabel("tokens/s over no speculation; _ by bytes")
    right.set_ylabel("ms per step; above: accepted length")
    for color, label in (("C0", "plain or verify pass"), ("C1", "drafting"), ("0.8", "rest")):
        right.bar(0, 0, color=color, label=label)
    right.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

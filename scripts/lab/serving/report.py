"""What ``scripts/bench_serving.py`` writes and prints: CSV, JSON, plot, tables, verdicts."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from lab.serving.arithmetic import (
    NONE,
    STOCK,
    Scenario,
    median_interval,
    ratios,
    spread,
    verdict,
)
from vllm_kvcompress.errors import ConfigError

TIMES = ("throughput", "ttft", "tpot")
RATIOS = (*TIMES, "peak_running", "kv_bytes_per_request")
"""Metrics shown as ratios to stock; the others are counts that may be 0 and are shown as such."""

UNITS = {
    "throughput": "output tokens/s",
    "ttft": "s",
    "tpot": "s",
    "duration": "s",
    "peak_running": "requests",
    "peak_kv_usage": "share of the pool",
    "kv_bytes_per_request": "bytes",
    "preemptions": "count",
    "prefix_hit_tokens": "tokens",
    "compactions": "count",
    "deferrals": "engine steps",
    "uncompressed_requests": "count",
    "blocks_taken": "blocks",
    "blocks_returned": "blocks",
    "compaction_seconds": "s",
}
HEADERS = {
    "throughput": "throughput",
    "ttft": "time to\nfirst token",
    "tpot": "time per\noutput token",
    "peak_running": "peak of\nrequests",
    "kv_bytes_per_request": "KV bytes\nper request",
    "preemptions": "preemp-\ntions",
    "compactions": "compac-\ntions",
    "deferrals": "defer-\nrals",
}


@dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes
    ----------
    scenario : Scenario
        Where.
    round : int
        From 1; 0 is the warm-up, whose blocks per request are kept.
    position : int
        Place of the measurement in its round, from 1; 0 in the warm-up.
    variant, metric : str
        "stock", "none" or a ratio; a key of `UNITS`.
    value : float
        In the metric's unit.
    """

    scenario: Scenario
    round: int
    position: int
    variant: str
    metric: str
    value: float


class Results:
    """Rows of a run, and what can be read off them."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    @property
    def scenarios(self) -> list[Scenario]:
        """In the order they were measured."""
        return list(dict.fromkeys(row.scenario for row in self.rows))

    def variants(self, scenario: Scenario) -> list[str]:
        """Stock, none, then ratios from large to small."""
        names = {row.variant for row in self.rows if row.scenario == scenario}
        first = {STOCK: 3.0, NONE: 2.0}
        return sorted(names, key=lambda name: -first.get(name, 0.0) or -float(name))

    def values(self, scenario: Scenario, variant: str, metric: str) -> dict[int, float]:
        """One metric by round."""
        key = (scenario, variant, metric)
        return {r.round: r.value for r in self.rows if (r.scenario, r.variant, r.metric) == key}

    def ratios(self, scenario: Scenario, variant: str, metric: str) -> list[float]:
        """One metric over stock's, per round."""
        mine = self.values(scenario, variant, metric)
        return ratios(mine, self.values(scenario, STOCK, metric))


def check_new_folder(folder: Path) -> None:
    """Refuse a results folder that exists, even an empty one: results are never written over."""
    if folder.exists():
        raise ConfigError(f"--out: {folder} exists; name a folder that does not exist yet.")


# --- files --------------------------------------------------------------------------------

SCENARIO_FIELDS = tuple(Scenario.__dataclass_fields__)
RUN_FIELDS = ("command", "commit", "versions", "device")


class CsvLog:
    """Long-format CSV, written row by row: a run that is cut short leaves what it had.

    Parameters
    ----------
    path : Path
        A new file.
    about : dict
        Has `RUN_FIELDS`.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._file = path.open("x", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._run = [
            json.dumps(about[key]) if isinstance(about[key], dict) else about[key]
            for key in RUN_FIELDS
        ]
        measured = ("round", "position", "variant", "metric", "value", "unit")
        self._writer.writerow([*measured, *SCENARIO_FIELDS, *RUN_FIELDS])

    def write(self, rows: Sequence[Row]) -> None:
        """Append rows and flush."""
        for row in rows:
            measured = (row.round, row.position, row.variant, row.metric, f"{row.value:.9g}")
            where = asdict(row.scenario).values()
            self._writer.writerow([*measured, UNITS[row.metric], *where, *self._run])
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def summary(results: Results) -> list[dict[str, Any]]:
    """Per scenario and variant: medians, ratios with spread; and the verdict on `none`."""
    found = []
    for scenario in results.scenarios:
        variants = {}
        for name in results.variants(scenario):
            metrics = {}
            for metric in UNITS:
                values = list(results.values(scenario, name, metric).values())
                if not values:
                    continue
                entry: dict[str, Any] = {"values": asdict(spread(values))}
                if shares := results.ratios(scenario, name, metric):
                    entry["ratio_to_stock"] = asdict(spread(shares))
                metrics[metric] = entry
            variants[name] = metrics
        verdicts = {
            metric: verdict(results.ratios(scenario, NONE, metric))
            for metric in TIMES
            if results.ratios(scenario, NONE, metric)
        }
        found.append({**asdict(scenario), "variants": variants, "none_against_stock": verdicts})
    return found


def write_plot(path: Path, results: Results, device: str) -> None:
    """One panel per metric: ratios to stock over variants, a line per scenario."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(RATIOS), figsize=(4 * len(RATIOS), 4.5))
    for axis, metric in zip(axes, RATIOS, strict=True):
        for scenario in results.scenarios:
            names = [v for v in results.variants(scenario) if v != STOCK]
            pairs = [(name, results.ratios(scenario, name, metric)) for name in names]
            points = [(name, spread(values)) for name, values in pairs if values]
            middle = [s.median for _, s in points]
            bars = [[s.median - s.low for _, s in points], [s.high - s.median for _, s in points]]
            labels = [label(name) for name, _ in points]
            axis.errorbar(labels, middle, bars, marker="o", capsize=3, label=scenario.title)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_ylim(bottom=0)
        axis.set_title(HEADERS[metric].replace("\n", " "))
    axes[0].set_ylabel("ratio to stock vLLM")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"Plugin over stock vLLM, median, lowest and highest of rounds ({device})")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# --- the terminal -------------------------------------------------------------------------


def label(variant: str) -> str:
    """A variant as people say it: "12 %"."""
    return variant if variant in (STOCK, NONE) else f"{float(variant) * 100:g} %"


def _shown(metric: str, value: float) -> tuple[str, str]:
    """A value and its unit as people read them."""
    if metric == "kv_bytes_per_request":
        return f"{value / 2**20:,.2f}", " MiB"
    if metric in ("ttft", "tpot"):
        return f"{value * 1000:,.1f}", " ms"
    return (f"{value:,.1f}", " tok/s") if metric == "throughput" else (f"{value:g}", "")


def _cell(results: Results, scenario: Scenario, variant: str, metric: str) -> str:
    values = list(results.values(scenario, variant, metric).values())
    if not values:
        return ""
    if metric in RATIOS and variant != STOCK:
        shares = results.ratios(scenario, variant, metric)
        if not shares:
            return ""
        s = spread(shares)
        digits = 4 if s.median < 0.1 else 3
        if len(shares) == 1:
            return f"{s.median:.{digits}f}"
        return f"{s.median:.{digits}f}\n[{s.low:.{digits}f}, {s.high:.{digits}f}]"
    s = spread(values)
    (middle, unit), (low, _), (high, _) = (_shown(metric, x) for x in (s.median, s.low, s.high))
    return middle + unit if low == high else f"{middle}{unit}\n[{low}, {high}]"


def make_table(results: Results, scenario: Scenario) -> Table:
    """One scenario. Stock's row has values, the others ratios to it; counts are counts."""
    pool = f"{scenario.pool_bytes / 2**20:,.1f} MiB"
    rounds = len(results.values(scenario, STOCK, "throughput"))
    title = f"{scenario.title} ({pool}), {scenario.num_requests} requests, {rounds} rounds"
    table = Table(title=title, show_lines=True)
    table.add_column("", no_wrap=True)
    for header in HEADERS.values():
        table.add_column(header, justify="right", no_wrap=True)
    for variant in results.variants(scenario):
        cells = [_cell(results, scenario, variant, metric) for metric in HEADERS]
        table.add_row(label(variant), *(cell.replace("[", r"\[") for cell in cells))
    return table


def verdict_line(results: Results, scenario: Scenario) -> str:
    """Whether `none` is within 1 % of stock, per time metric."""
    parts = []
    for metric in TIMES:
        shares = results.ratios(scenario, NONE, metric)
        if shares:
            low, high = median_interval(shares)
            found = f"{median(shares):.3f} [{low:.3f}, {high:.3f}]"
            parts.append(f"{metric} {found} {verdict(shares)}")
    return f"none against stock ({scenario.title}): " + ("; ".join(parts) or "not measured")

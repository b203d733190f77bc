"""A run as the report's parts see it: records, cells, and the order and look of policies."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vllm_kvcompress.evaluation.quality import charts, text
from vllm_kvcompress.evaluation.quality.answers import Flip, find_flips
from vllm_kvcompress.evaluation.quality.cells import (
    Cell,
    Overall,
    continuation_tasks,
    make_cells,
    make_overall,
)
from vllm_kvcompress.evaluation.quality.intervals import Interval
from vllm_kvcompress.evaluation.quality.records import BASELINE, Record


@dataclass(frozen=True)
class Run:
    """What a folder holds.

    Attributes
    ----------
    asked, measured_with : dict
        Of run.json.
    records : list[Record]
        One per sample and setting.
    failures : list[dict]
        With "task", "sample" and "why".
    """

    asked: Mapping[str, Any]
    measured_with: Mapping[str, Any]
    records: Sequence[Record]
    failures: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @cached_property
    def cells(self) -> list[Cell]:
        """Lengths apart."""
        return make_cells(self.records)

    @cached_property
    def pooled(self) -> list[Cell]:
        """All lengths of a task together."""
        return make_cells(self.records, by_length=False)

    @cached_property
    def overall(self) -> list[Overall]:
        """Over tasks that answer questions."""
        return make_overall(self.pooled, self.continuation)

    @cached_property
    def continuation(self) -> set[str]:
        """Tasks that predict a text."""
        return continuation_tasks(self.records)

    @cached_property
    def flips(self) -> list[Flip]:
        """Answers that changed sides; predicted texts have none."""
        return find_flips(each for each in self.records if each.task not in self.continuation)

    @cached_property
    def policies(self) -> list[str]:
        """Without the baseline, in the order they were measured; the place gives the style."""
        names = dict.fromkeys(record.policy for record in self.records)
        return [name for name in names if name != BASELINE]

    @cached_property
    def protocols(self) -> list[str]:
        """In the order they were measured."""
        return list(dict.fromkeys(record.protocol for record in self.records))

    @cached_property
    def tasks(self) -> list[str]:
        """In the order they were measured."""
        return list(dict.fromkeys(record.task for record in self.records))

    @cached_property
    def budgets(self) -> list[float]:
        """Of the policies, from large to small."""
        return sorted({r.budget for r in self.records if r.policy != BASELINE}, reverse=True)

    @cached_property
    def has_kept(self) -> bool:
        """Whether every record says what was held."""
        return all(record.kept is not None for record in self.records)

    @cached_property
    def has_baseline(self) -> bool:
        """Whether the whole cache was measured at all."""
        return any(record.policy == BASELINE for record in self.records)

    def heading(self, protocol: str) -> str:
        """A protocol's heading; "" where there is one protocol only."""
        if len(self.protocols) == 1:
            return ""
        return f"<h3>Protocol: {text.escape(protocol)}</h3>"

    def order(self, cell: Cell | Overall) -> tuple[int, float]:
        """Baseline first, then policies as measured, from large budgets to small ones."""
        place = -1 if cell.policy == BASELINE else self.policies.index(cell.policy)
        return place, -cell.budget

    def label(self, policy: str) -> str:
        """A policy in a row's heading, with its line's look."""
        if policy == BASELINE:
            return "whole cache"
        swatch = charts.swatch(self.policies.index(policy))
        return f'{swatch} <span class="name">{text.escape(policy)}</span>'


FEW_POLICIES = 6
"""Up to here the bars of all lines are shown at once; more would hide the lines."""


def figure(
    run: Run, ident: str, cells: Sequence[Cell], caption: tuple[str, str], title: str, x_label: str
) -> str:
    """Cells of one task and protocol as a chart.

    Parameters
    ----------
    run : Run
        Theirs.
    ident : str
        Unique on the page.
    cells : sequence of Cell
        One per setting.
    caption : (str, str)
        What is above the chart, and a smaller note.
    title, x_label : str
        For screen readers; below the axis.
    """
    groups = defaultdict(list)
    baseline: tuple[float, Interval | None] | None = None
    for cell in cells:
        if cell.policy == BASELINE:
            # A text's whole cache agrees with itself by definition.
            certain = cell.task in run.continuation
            baseline = cell.mean, None if certain else cell.interval
            continue
        x = cell.kept if run.has_kept and cell.kept is not None else cell.budget
        groups[cell.policy].append(charts.Point(x, cell.mean, cell.interval, cell.budget))
    lines = [
        charts.Line(name, run.policies.index(name), groups[name])
        for name in run.policies
        if name in groups
    ]
    chart = charts.line_chart(ident, title, lines, baseline, x_label)
    head, note = (text.escape(part) for part in caption)
    return f"<figure><figcaption>{head} <small>{note}</small></figcaption>{chart}</figure>"


def chart_grid(run: Run, figures: Sequence[str]) -> str:
    """Charts side by side as far as there is room."""
    kind = "charts many" if len(run.policies) > FEW_POLICIES else "charts"
    return f'<div class="{kind}">{"".join(figures)}</div>'

"""Tables and the plot."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from lab.kernel_bench.device import ON_GPU
from lab.kernel_bench.rows import BOTH, NOT_MEASURED, Result, number


def show(title: str, columns: list[str], lines: list[list[str]]) -> None:
    """A table, through rich where it is installed."""
    if importlib.util.find_spec("rich") is None:
        print(f"\n{title}\n" + "\n".join("  ".join(line) for line in [columns, *lines]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=index == 0)
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def short(note: str) -> str:
    """What was not measured needs no reason in every line; the CSV has it."""
    return NOT_MEASURED if note.startswith(NOT_MEASURED) else note


def show_results(results: list[Result], copy_gbps: float) -> None:
    """Time, bytes, bandwidth and its share of a copy's, per row and size."""
    lines = []
    for result in results:
        ours = result.row.provider
        times = [
            number(result.times[p][0]) if p in result.times else short(result.notes.get(p, ""))
            for p in (ours, "torch")
        ]
        rate = result.gbps(ours)
        lines.append(
            [
                result.row.name, result.model, f"{result.shape.tokens:,}", str(result.shape.batch),
                *times, f"{result.row.num_bytes(result.shape) / 1e6:,.1f}",
                number(rate) or "-", number(rate / copy_gbps) or "-",
            ]
        )  # fmt: skip
    columns = ["row", "model", "tokens", "batch", "ms", "torch ms", "MB", "GB/s", "of copy"]
    show(f"Kernels; a copy: {copy_gbps:,.0f} GB/s; layers of both models are alike", columns, lines)


def plot(results: list[Result], copy_gbps: float, about: dict[str, Any], path: Path) -> None:
    """Share of a copy's bandwidth over tokens, a panel per batch; on a CPU torch's times."""
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plot")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = sorted({result.shape.batch for result in results})
    figure, panels = pyplot.subplots(
        1, len(batches), figsize=(6 * len(batches) + 3, 5.5), sharey=True, squeeze=False
    )
    names = list(dict.fromkeys((result.row, result.model) for result in results))
    for panel, batch in zip(panels[0], batches, strict=True):
        for index, (row, model) in enumerate(names):
            provider = row.provider if ON_GPU else "torch"
            points = sorted(
                (r.shape.tokens, r.gbps(provider) / copy_gbps if ON_GPU else r.times[provider][0])
                for r in results
                if (r.row, r.model, r.shape.batch) == (row, model, batch) and provider in r.times
            )
            if points:
                style = {"color": f"C{index % 10}", "linestyle": ["-", "--", ":"][index // 10 % 3]}
                label = row.name if model == BOTH else f"{row.name} ({model})"
                panel.plot(*zip(*points, strict=True), marker="o", ms=4, label=label, **style)
        if ON_GPU:
            for target in (0.7, 0.8):
                panel.axhline(target, color="0.7", linewidth=0.8)
        else:
            panel.set_yscale("log")
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens per request")
        panel.set_title(f"batch {batch}")
    title = "share of a copy's bandwidth" if ON_GPU else "ms of the torch version (no kernel)"
    panels[0][0].set_ylabel(title)
    panels[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(f"{about['device']}, torch {about['torch']}, triton {about['triton']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

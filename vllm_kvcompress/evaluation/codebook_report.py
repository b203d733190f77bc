"""What ``kvcompress codebook`` shows: profiles summarized over prompts, as tables, CSV and plot."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_kvcompress.cli.common import make_table
from vllm_kvcompress.evaluation.codebook_choice import Limits, Tried
from vllm_kvcompress.evaluation.codebook_profile import Comparison, LayerProfile
from vllm_kvcompress.evaluation.whole_files import whole

KINDS = ("keys", "values")
NEEDED = "needed"


@dataclass(frozen=True)
class SpindleRow:
    """Books without limit of one layer and kind, over all prompts.

    Attributes
    ----------
    ratio : float
        Budget of the eviction; 1 evicts nothing.
    layer : int
        From 0.
    kind : {"keys", "values"}
        What is coded.
    coded_tokens : float
        Per prompt, mean.
    entries_mean, entries_max : float
        Entries as a share of the coded tokens, over heads and prompts.
    tokens_per_entry : float
        Tokens of all heads and prompts over their entries.
    alone : float
        Share of the tokens whose entry stands for no other.
    build_seconds_per_1k : float
        Building the layer's books of this kind, all KV heads, per 1,000 coded tokens; mean.
    prompts : int
        How many.
    """

    ratio: float
    layer: int
    kind: str
    coded_tokens: float
    entries_mean: float
    entries_max: float
    tokens_per_entry: float
    alone: float
    build_seconds_per_1k: float
    prompts: int


@dataclass(frozen=True)
class FitRow:
    """Books of one size in one layer, over all prompts.

    Attributes
    ----------
    ratio, layer
        As in `SpindleRow`.
    entries : float or "needed"
        Entries as a share of the coded tokens; "needed": as many as the thresholds ask for.
    slots : float
        Slots of entries and codes, in whole blocks, over slots of the coded tokens.
    forced_keys, forced_values, forced_worst_prompt : float
        Share of the vectors that took the nearest entry instead of a similar one; the larger of
        both in the worst prompt.
    mean_loss_keys, mean_loss_values, max_loss_keys, max_loss_values : float
        1 - cosine to the entry.
    error_mean, error_worst_prompt, error_worst_query : float
        Relative error of the layer's attention output: mean, mean of the worst prompt, worst query.
    """

    ratio: float
    layer: int
    entries: float | str
    slots: float
    forced_keys: float
    forced_values: float
    forced_worst_prompt: float
    mean_loss_keys: float
    mean_loss_values: float
    max_loss_keys: float
    max_loss_values: float
    error_mean: float
    error_worst_prompt: float
    error_worst_query: float


@dataclass(frozen=True)
class CheckRow:
    """Reading on over coded layers, all prompts.

    Attributes
    ----------
    ratio : float
        As in `SpindleRow`.
    layers : str
        Numbers of the coded layers.
    entries : float
        As a share of the coded tokens.
    equal_tokens, tokens : int
        Next tokens that equal those over the survivors as they are, of how many.
    equal_prompts, prompts : int
        Prompts of which all tokens are equal, of how many.
    divergence : float
        Kullback-Leibler divergence of the next token's distribution, nats, mean.
    saving : float
        Share of all layers' slots that come free.
    """

    ratio: float
    layers: str
    entries: float
    equal_tokens: int
    tokens: int
    equal_prompts: int
    prompts: int
    divergence: float
    saving: float


def _mean(numbers: Iterable[float]) -> float:
    found = list(numbers)
    return sum(found) / len(found)


def spindle_rows(profiles: Sequence[LayerProfile]) -> list[SpindleRow]:
    """One row per budget, layer and kind."""
    rows = []
    for ratio, layer, same in _cells(profiles):
        for kind in KINDS:
            stats = [each.keys if kind == "keys" else each.values for each in same]
            pairs = list(zip(same, stats, strict=True))
            shares = [count / p.num_coded for p, book in pairs for count in book.entries]
            num_tokens = sum(p.num_coded * len(book.entries) for p, book in pairs)
            rows.append(
                SpindleRow(
                    ratio=ratio,
                    layer=layer,
                    kind=kind,
                    coded_tokens=_mean(p.num_coded for p in same),
                    entries_mean=_mean(shares),
                    entries_max=max(shares),
                    tokens_per_entry=num_tokens / sum(sum(book.entries) for book in stats),
                    alone=sum(book.num_alone for book in stats) / num_tokens,
                    build_seconds_per_1k=_mean(b.seconds / p.num_coded * 1000 for p, b in pairs),
                    prompts=len(same),
                )
            )
    return rows


def fit_rows(profiles: Sequence[LayerProfile]) -> list[FitRow]:
    """One row per budget, layer and size of the books."""
    rows = []
    for ratio, layer, same in _cells(profiles):
        for index, first in enumerate(same[0].fits):
            fits = [each.fits[index] for each in same]
            errors = [_mean(fit.errors) for fit in fits]
            rows.append(
                FitRow(
                    ratio=ratio,
                    layer=layer,
                    entries=NEEDED if first.share is None else first.share,
                    slots=sum(fit.num_slots for fit in fits) / sum(p.num_coded for p in same),
                    forced_keys=_mean(fit.forced[0] for fit in fits),
                    forced_values=_mean(fit.forced[1] for fit in fits),
                    forced_worst_prompt=max(max(fit.forced) for fit in fits),
                    mean_loss_keys=_mean(fit.mean_loss[0] for fit in fits),
                    mean_loss_values=_mean(fit.mean_loss[1] for fit in fits),
                    max_loss_keys=max(fit.max_loss[0] for fit in fits),
                    max_loss_values=max(fit.max_loss[1] for fit in fits),
                    error_mean=_mean(errors),
                    error_worst_prompt=max(errors),
                    error_worst_query=max(max(fit.errors) for fit in fits),
                )
            )
    return rows


def tried(
    profiles: Sequence[LayerProfile],
    group_of: Sequence[int],
    groups: tuple[int, ...],
    share: float,
    compared: Sequence[Comparison],
) -> Tried:
    """One choice over all prompts.

    Parameters
    ----------
    profiles : sequence of LayerProfile
        Of all layers and prompts, at one budget.
    group_of : sequence of int
        Layer group of every layer.
    groups, share
        The choice.
    compared : sequence of Comparison
        Its own, one per prompt.
    """
    index = next(i for i, fit in enumerate(profiles[0].fits) if fit.share == share)
    coded = [each for each in profiles if group_of[each.layer] in groups]
    return Tried(
        groups,
        share,
        sum(each.equal for each in compared) / sum(each.tokens for each in compared),
        _mean(each.divergence for each in compared),
        sum(each.num_coded for each in coded),
        sum(each.fits[index].num_slots for each in coded),
        sum(each.num_coded for each in profiles),
    )


def check_row(
    ratio: float, layers: Sequence[int], found: Tried, compared: Sequence[Comparison]
) -> CheckRow:
    """One choice as a row; arguments as of `tried`."""
    return CheckRow(
        ratio=ratio,
        layers=" ".join(map(str, layers)),
        entries=found.share,
        equal_tokens=sum(each.equal for each in compared),
        tokens=sum(each.tokens for each in compared),
        equal_prompts=sum(each.equal == each.tokens for each in compared),
        prompts=len(compared),
        divergence=found.divergence,
        saving=found.saving,
    )


def _cells(
    profiles: Sequence[LayerProfile],
) -> Iterable[tuple[float, int, list[LayerProfile]]]:
    cells: dict[tuple[float, int], list[LayerProfile]] = {}
    for each in profiles:
        cells.setdefault((each.ratio, each.layer), []).append(each)
    for (ratio, layer), same in sorted(cells.items(), key=lambda item: (-item[0][0], item[0][1])):
        yield ratio, layer, same


def spindle_table(profiles: Sequence[LayerProfile]) -> Table:
    """Books without limit, at one budget: keys, then values."""
    each = ("tokens/entry", "entries", "most", "alone", "build s/1k")
    table = make_table("layer", "coded", *each, *each, right=range(12))
    rows = iter(spindle_rows(profiles))
    for keys, values in zip(rows, rows, strict=True):
        cells: list[str] = []
        for row in (keys, values):
            shares = (row.entries_mean, row.entries_max, row.alone)
            cells += [f"{row.tokens_per_entry:.1f}", *(f"{value:.1%}" for value in shares)]
            cells.append(f"{row.build_seconds_per_1k:.2g}")
        table.add_row(str(keys.layer), f"{keys.coded_tokens:,.0f}", *cells)
    return table


def error_table(profiles: Sequence[LayerProfile]) -> Table:
    """Errors of books of all sizes, at one budget, every layer by itself."""
    rows, num_layers = fit_rows(profiles), max(each.layer for each in profiles) + 1
    shares = [fit.share for fit in profiles[0].fits if fit.share is not None]
    titles = [NEEDED, *(f"{share:.0%}" for share in shares)]
    table = make_table("layer", *titles, right=range(len(titles) + 1))
    for layer in range(num_layers):
        errors = [row.error_worst_prompt for row in rows if row.layer == layer]
        table.add_row(str(layer), *(f"{error:.3f}" for error in errors))
    return table


def choice_table(found: Sequence[Tried], limits: Limits) -> Table:
    """Next tokens that stay the same and slots that come free, by shallow part and size."""
    shares = sorted({each.share for each in found})
    table = make_table(
        "groups", *(f"{share:.0%}" for share in shares), right=range(1 + len(shares))
    )
    for groups in dict.fromkeys(each.groups for each in found):
        same = sorted((t for t in found if t.groups == groups), key=lambda each: each.share)
        cells = (f"{t.agreement:.1%}, {t.saving:.0%}{'*' if t.pays(limits) else ' '}" for t in same)
        table.add_row(f"first {len(groups)}" if len(groups) > 1 else "first", *cells)
    return table


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    """Rows of one of the dataclasses above; floats have six digits that count."""
    with whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(asdict(rows[0]))
        for row in rows:
            values = asdict(row).values()
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])


def plot(path: Path, rows: Sequence[SpindleRow], title: str) -> None:
    """Tokens per entry by layer, keys and values side by side, a line per budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogFormatter, MaxNLocator

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, kind in zip(axes, KINDS, strict=True):
        for ratio in dict.fromkeys(row.ratio for row in rows):
            shown = [row for row in rows if (row.kind, row.ratio) == (kind, ratio)]
            layers = [row.layer for row in shown]
            label = "all tokens" if ratio == 1 else f"{ratio:.0%} kept"
            axis.plot(layers, [row.tokens_per_entry for row in shown], marker="o", label=label)
        axis.axhline(1, color="0.8", linewidth=0.8)
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("layer")
        axis.set_title(kind if kind == "values" else "keys (before RoPE)", fontsize=10)
    axes[0].set_ylabel("tokens per entry")
    for which in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
        which(LogFormatter(minor_thresholds=(2, 0.5)))
    axes[1].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    with whole(path) as part:
        figure.savefig(part, dpi=130, format=path.suffix[1:])
    pyplot.close(figure)

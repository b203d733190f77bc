"""Right answers on the needle task against bytes kept: codebooks and eviction beside each other.

    python scripts/codebook_curve.py --out FOLDER
    python scripts/codebook_curve.py --out FOLDER --methods snapkv spindlekv-evict --lengths 1800

Writes codebook_curve.csv, codebook_curve.png, codebook_curve_digits.png and run.json into a new
folder. Every method gets settings that keep the same bytes; entries, codes, tails and whole blocks
are counted (`lab.codebook.curve`). Prompts are prefilled and decoded by
Hugging Face transformers on CPU in float32, compressed in between by the worker's own code
(`vllm_kvcompress.evaluation.replay`). One thread: with few cores, threads wait for each other
longer than they compute.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from lab.codebook.curve import (
    Cell,
    Method,
    Point,
    Shape,
    best_within,
    paired,
    paper_share,
    points,
    right_digits,
    used_share,
)
from lab.places import PROBE_MODEL, ROOT
from vllm_kvcompress.evaluation.provenance import provenance, public_words
from vllm_kvcompress.evaluation.quality.intervals import wilson
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.evaluation.tasks.needle import NeedleSample, make_samples

POOLED = 13


def pooled(**policy: Any) -> dict[str, Any]:
    """Fields that give two policies the same window of 32 tokens and the same average over 13."""
    return {"observation_window": 32, "policy": {"kernel_size": POOLED, **policy}}


def coded(shallow: float, entries: float) -> dict[str, Any]:
    """Fields of a setting with books of this size in this share of the layers."""
    return {"codebook": {"shallow": shallow, "entries": entries}}


AS_PAPER = {"policy": {"selection": "kv_head", "kernel_size": 1}}
UNION = {"selection": "union"}
METHODS = [
    Method("snapkv", "snapkv"),
    Method("pyramidkv", "pyramidkv"),
    Method("windowkv", "windowkv"),
    Method("snapkv-w32-k13", "snapkv", pooled()),
    Method("pyramidkv-w32-k13", "pyramidkv", pooled()),
    Method("spindlekv-evict", "spindlekv-evict", AS_PAPER),
    Method("spindlekv-evict-union", "spindlekv-evict", {"policy": {"kernel_size": 1, **UNION}}),
    Method("spindlekv-evict-k5", "spindlekv-evict", {"policy": {"kernel_size": 5}}),
    Method("spindlekv-evict-k13", "spindlekv-evict", pooled()),
    Method("spindlekv-evict-k13-union", "spindlekv-evict", pooled(**UNION)),
    Method("spindlekv-s0.25-e0.5", "spindlekv", {**AS_PAPER, **coded(0.25, 0.5)}),
    Method("spindlekv-s0.5-e0.5", "spindlekv", {**AS_PAPER, **coded(0.5, 0.5)}),
    Method("spindlekv-k13-s0.25-e0.5", "spindlekv", {**pooled(), **coded(0.25, 0.5)}),
    *(
        Method(f"spindlekv-k13-s{s:g}-e{e:g}", "spindlekv", {**pooled(), **coded(s, e)})
        for s in (0.5, 1.0)
        for e in (0.1, 0.25, 0.5)
    ),
    Method("spindlekv-k13-s0.5-e0.25-union", "spindlekv", {**pooled(**UNION), **coded(0.5, 0.25)}),
    Method("codebook-s0.5", "spindlekv", {"codebook": {"shallow": 0.5}}, "entries"),
    Method("codebook-s1", "spindlekv", {"codebook": {"shallow": 1.0}}, "entries"),
]
NAMES = [method.name for method in METHODS]
PAIRS = [
    ("spindlekv-evict", "spindlekv-evict-union"),
    ("spindlekv-evict-k13", "spindlekv-evict-k13-union"),
    ("spindlekv-k13-s0.5-e0.25", "spindlekv-k13-s0.5-e0.25-union"),
]
COLORS = ["C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9", "k"]  # without grey
REFERENCES = ["snapkv", "pyramidkv", "windowkv", "spindlekv-evict-k13"]
FULL = "none"
BUDGETS = [0.03, 0.06, 0.12, 0.25, 0.5, 0.6]
TABLE_BUDGETS = [0.06, 0.12, 0.25, 0.5]
NUM_ANSWER_TOKENS = 8
NAME = "codebook_curve"
COLUMNS = [
    "prompt_tokens", "method", "budget", "ratio", "shallow", "entries", "selection",
    "kernel_size", "kept_bytes", "full_bytes", "kept_share", "kept_share_bf16_d128", "paper_share",
    "entries_used", "right", "prompts", "low", "high", "right_digits", "digits_per_prompt",
]  # fmt: skip


class Curve:
    """Cells of all lengths."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.methods = [method for method in METHODS if method.name in args.methods]
        self.replay = Replay(args.model, args.block_size)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        config = self.replay.model.config
        heads = config.num_key_value_heads
        head_dim = self.replay.layers[0].self_attn.head_dim
        self.shape = Shape(config.num_hidden_layers, heads, head_dim, 4, args.block_size)
        self.other = Shape(config.num_hidden_layers, heads, 128, 2, args.block_size)
        self.cells: list[Cell] = []

    def measure(self, length: int, count: int) -> None:
        """All points of all methods at one prompt length."""
        samples = make_samples(count, length, self.tokenizer.encode, seed=self.args.seed)
        lens = [sample.num_tokens for sample in samples]
        todo = [(FULL, Point(1.0, 1.0, 1.0, None))]
        for method in self.methods:
            found = points(method, self.args.budgets, lens, self.shape)
            todo += [(method.name, point) for point in found]
        results: list[list[tuple[int, float, float | None]]] = [[] for _ in todo]
        for sample in track(samples, f"{length} tokens", console=Console(stderr=True)):
            prompt = self.replay.prefill(self.tokenizer.encode(sample.prompt))
            for (_, point), rows in zip(todo, results, strict=True):
                rows.append(self.answer(prompt, sample, point))
        for (name, point), rows in zip(todo, results, strict=True):
            self.cells.append(self.cell(name, length, point, samples, rows))

    def answer(
        self, prompt: Any, sample: NeedleSample, point: Point
    ) -> tuple[int, float, float | None]:
        """Right digits, the paper's ratio and the entries in use."""
        found = self.replay.compress(prompt, point.config)
        tokens = self.replay.decode(prompt, found.cache, NUM_ANSWER_TOKENS)
        about = (self.shape, sample.num_tokens, point.config, found.num_entries)
        digits = right_digits(self.tokenizer.decode(tokens), sample.answer)
        return digits, paper_share(*about), used_share(*about)

    def cell(
        self,
        name: str,
        length: int,
        point: Point,
        samples: Sequence[NeedleSample],
        rows: Sequence[tuple[int, float, float | None]],
    ) -> Cell:
        """What all prompts of one point come to."""
        lens = [sample.num_tokens for sample in samples]
        used = [share for _, _, share in rows if share is not None]
        full = sum(map(self.shape.full_slots, lens)) / len(lens) * self.shape.slot_bytes
        return Cell(
            method=name,
            length=length,
            point=point,
            kept_bytes=point.share * full,
            full_bytes=full,
            other_share=self.other.share(lens, point.config),
            paper_share=sum(share for _, share, _ in rows) / len(rows),
            used_share=sum(used) / len(used) if used else None,
            digits=tuple(digits for digits, _, _ in rows),
            num_digits=len(samples[0].answer),
        )


def write_csv(path: Path, cells: Sequence[Cell]) -> None:
    """One row per cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for cell in cells:
            config, used = cell.point.config, cell.used_share
            book = None if config is None else config.codebook
            share = wilson(cell.right, len(cell.digits))
            low, high = share.low, share.high
            writer.writerow(
                [
                    cell.length,
                    cell.method,
                    cell.point.budget,
                    "" if config is None else config.budget.ratio,
                    "" if book is None else book.shallow,
                    "" if book is None else book.entries,
                    "" if config is None else config.policy.params.get("selection", ""),
                    "" if config is None else config.policy.params.get("kernel_size", ""),
                    round(cell.kept_bytes),
                    round(cell.full_bytes),
                    f"{cell.point.share:.4f}",
                    f"{cell.other_share:.4f}",
                    f"{cell.paper_share:.4f}",
                    "" if used is None else f"{used:.3f}",
                    cell.right,
                    len(cell.digits),
                    f"{low:.3f}",
                    f"{high:.3f}",
                    f"{cell.digit_share:.4f}",
                    "".join(map(str, cell.digits)),
                ]
            )


def of(cells: Sequence[Cell], method: str, length: int | None = None) -> list[Cell]:
    """One method's cells, of one length or of all."""
    return [c for c in cells if c.method == method and length in (None, c.length)]


def print_tables(cells: Sequence[Cell], methods: Sequence[str], markdown: bool = False) -> None:
    """Right answers within fixed budgets, one table per length, one of all; then the pairs."""
    console = Console(width=140)
    lengths = list(dict.fromkeys(cell.length for cell in cells))
    for length in [*lengths, None]:
        whole = of(cells, FULL, length)
        prompts, right = sum(len(c.digits) for c in whole), sum(c.right for c in whole)
        title = f"{length or 'all'} tokens, {prompts} prompts; the whole cache: {right}"
        if length is None:
            rows = [[name, *summed_row(cells, name, lengths)] for name in methods]
        else:
            rows = [[name, *row(of(cells, name, length))] for name in methods]
        if markdown:
            print(f"\n{title}\n\n| method | " + " | ".join(f"{b:.0%}" for b in TABLE_BUDGETS), "|")
            print("|---" * (len(TABLE_BUDGETS) + 1) + "|")
            for each in rows:
                print("| " + " | ".join(each) + " |")
            continue
        table = Table("method", *(f"{budget:.0%}" for budget in TABLE_BUDGETS), title=title)
        for each in rows:
            table.add_row(*each)
        console.print(table)
    for one, other in PAIRS:
        if one in methods and other in methods:
            found = paired(of(cells, one), of(cells, other))
            print(
                f"{one}: {found.first} of {found.total} right that {other} has wrong; the other "
                f"way round {found.second}; right digits {found.digits[0]} and {found.digits[1]}"
            )


def row(cells: Sequence[Cell]) -> list[str]:
    """ "11/20, 86 % (11.8 %)": right answers, right digits, bytes; of the best within budget."""
    found = [best_within(cells, budget) for budget in TABLE_BUDGETS]
    return [
        "-"
        if cell is None
        else f"{cell.right}/{len(cell.digits)}, {cell.digit_share:.0%} ({cell.point.share:.1%})"
        for cell in found
    ]


def summed_row(cells: Sequence[Cell], name: str, lengths: Sequence[int]) -> list[str]:
    """ "22/44": right answers over all lengths of which a point is within the budget."""
    texts = []
    for budget in TABLE_BUDGETS:
        found = [best_within(of(cells, name, length), budget) for length in lengths]
        inside = [cell for cell in found if cell is not None]
        total = sum(len(cell.digits) for cell in inside)
        texts.append(f"{sum(cell.right for cell in inside)}/{total}" if inside else "-")
    return texts


def plot(path: Path, cells: Sequence[Cell], methods: Sequence[str], by_digit: bool) -> None:
    """One column per length; above what evicts tokens, below what codes them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = list(dict.fromkeys(cell.length for cell in cells))
    evicting = [name for name in methods if not of(cells, name)[0].point.config.codebook]  # type: ignore[union-attr]
    coding = [name for name in methods if name not in evicting]
    kinds = [names for names in (evicting, coding) if names]
    grey = [name for name in REFERENCES if name in methods]
    figure, axes = pyplot.subplots(
        len(kinds), len(lengths), figsize=(5 * len(lengths), 4.5 * len(kinds)), sharey=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for line, names in enumerate(kinds):
        others = grey if names is coding else []
        for axis, length in zip(axes[line], lengths, strict=True):
            whole = of(cells, FULL, length)[0]
            for index, name in enumerate([*others, *names]):
                found = of(cells, name, length)
                is_grey = name in others
                axis.plot(
                    [100 * cell.point.share for cell in found],
                    [height(cell, by_digit) for cell in found],
                    marker="o" if index % 2 else "s",
                    markersize=3.5,
                    linewidth=1.2,
                    linestyle=(":", "--", "-.", "-")[grey.index(name)] if is_grey else "-",
                    color="0.6" if is_grey else COLORS[(index - len(others)) % len(COLORS)],
                    label=name,
                )
            axis.axhline(height(whole, by_digit), color="0.8", linewidth=0.8)
            axis.set_xscale("log")
            ticks = [3, 6, 12, 25, 50]
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
            axis.set_xlabel("bytes kept (% of the prompt's cache)")
            axis.set_title(f"prompts of {length} tokens: {len(whole.digits)}", fontsize=10)
        axes[line][0].set_ylabel("right digits (%)" if by_digit else "right answers (%)")
        axes[line][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(
        "Needle task; probe model, replay on CPU in float32; the line is the whole cache"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def height(cell: Cell, by_digit: bool) -> float:
    """Percent of right digits or right answers."""
    return 100 * (cell.digit_share if by_digit else cell.right / len(cell.digits))


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--model", default=str(PROBE_MODEL), help="folder of a Llama-like model")
    parser.add_argument("--methods", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[600, 1800, 3500])
    parser.add_argument("--prompts", type=int, nargs="+", default=[20], help="one, or per length")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out: {args.out} exists; name a new folder")
    if len(args.prompts) not in (1, len(args.lengths)):
        parser.error(
            f"--prompts: {len(args.prompts)} numbers for {len(args.lengths)} lengths; "
            "give one, or one per length"
        )
    torch.set_num_threads(1)
    command = " ".join(["python", *public_words(sys.argv, ROOT)])
    run = provenance(command, ROOT)  # the checkout may change meanwhile
    started = time.monotonic()
    counts = args.prompts if len(args.prompts) > 1 else args.prompts * len(args.lengths)
    curve, seconds = Curve(args), {}
    args.out.mkdir(parents=True)
    for length, count in zip(args.lengths, counts, strict=True):
        begun = time.monotonic()
        curve.measure(length, count)
        seconds[length] = round(time.monotonic() - begun)
        write_csv(args.out / f"{NAME}.csv", curve.cells)  # a run cut short keeps what it has
    about: dict[str, Any] = {
        **run,
        "arguments": {**vars(args), "out": args.out.name, "model": Path(args.model).name},
        "seconds": round(time.monotonic() - started),
        "seconds_per_length": seconds,
    }
    text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    (args.out / "run.json").write_text(text, encoding="utf-8")
    names = [method.name for method in curve.methods if of(curve.cells, method.name)]
    print_tables(curve.cells, names, args.markdown)
    plot(args.out / f"{NAME}.png", curve.cells, names, by_digit=False)
    plot(args.out / f"{NAME}_digits.png", curve.cells, names, by_digit=True)
    return 0

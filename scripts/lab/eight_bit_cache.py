"""Survivors and answers over a cache of 8 bits, held against those over one in the model's type.

    python scripts/eight_bit_cache.py run --model "$(python scripts/smollm2.py)" \
        --out docs/benchmarks/eight_bit_cache_cpu.csv
    python scripts/eight_bit_cache.py show --out docs/benchmarks/eight_bit_cache_cpu.csv

`run` starts one engine per type of the cache, in this process, and sends every prompt of the needle
task under every preset, one request at a time. It notes which tokens the worker keeps, and whether
the number is in the answer. The Jaccard index of two sets of survivors, tokens in both over tokens
in either, is the mean over layers and KV heads; tokens that stay anyway (sinks, and the last block)
count. `show` prints the table of docs/results.md.
"""

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console

from lab.places import ROOT
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.provenance import provenance, public_words
from vllm_kvcompress.evaluation.quality.intervals import wilson
from vllm_kvcompress.evaluation.tasks.needle import NeedleSample, make_samples

PRESETS = ("adakv", "windowkv_qwen2.5", "auto")
COLUMNS = [
    "preset", "prompt", "style", "depth", "tokens", "kept", "jaccard", "right", "right_fp8", "same",
]  # fmt: skip
NUM_ANSWER_TOKENS = 10
"""A space and seven digits, each a token of its own, and what may follow them."""

Survivors = list[torch.Tensor]
"""Of one compaction, per KV cache group [layers, KV heads, kept] int64."""


def watch(compactor: Any) -> Survivors:
    """A list to which the compactor adds what it chooses, from now on, for one request a step."""
    chosen: Survivors = []
    select: Callable[..., torch.Tensor] = compactor.select_tokens

    def select_tokens(*args: Any) -> torch.Tensor:
        indices = select(*args)
        chosen.append(indices[:, 0].clone())
        return indices

    compactor.select_tokens = select_tokens
    return chosen


def jaccard(one: Survivors, other: Survivors) -> float:
    """Tokens in both over tokens in either, mean over layers and KV heads."""
    shares = []
    for mine, others in zip(one, other, strict=True):
        for a, b in zip(mine.flatten(0, 1).tolist(), others.flatten(0, 1).tolist(), strict=True):
            shares.append(len(set(a) & set(b)) / len(set(a) | set(b)))
    return mean(shares)


def run_engine(
    args: argparse.Namespace, cache_dtype: str, console: Console
) -> tuple[list[NeedleSample], dict[tuple[str, int], tuple[list[int], str, Survivors]]]:
    """Samples; per preset and prompt the tokens of the answer, its text, and the survivors."""
    setting = {"preset": "snapkv", "budget": {"ratio": args.ratio}}
    engine = Engine(
        str(args.model), setting, dtype=args.dtype, kv_cache_dtype=cache_dtype,
        max_model_len=4096, kv_cache_memory_bytes=512 << 20,
    )  # fmt: skip
    try:
        samples = make_samples(args.prompts, args.length, engine.tokenize, seed=args.seed)
        chosen, found = watch(engine.runner.compactor), {}
        for number, sample in enumerate(samples):
            for preset in ("none", *args.presets):
                more = {} if preset == "none" else {"kv_budget_ratio": args.ratio}
                xargs = {"kv_compression": preset, **more}
                name = f"{preset}-{number}"
                engine.add(name, engine.tokenize(sample.prompt), NUM_ANSWER_TOKENS, xargs)
                engine.drain()
                tokens = engine.results[name].token_ids
                found[preset, number] = tokens, engine.decode(tokens), list(chosen)
                chosen.clear()
            console.print(f"{cache_dtype}: {number + 1} of {len(samples)} prompts")
    finally:
        engine.close()
    return samples, found


def run(args: argparse.Namespace) -> None:
    """Measure, and write one row per preset and prompt."""
    console = Console(stderr=True)
    words = " ".join(["python", *public_words(sys.argv, ROOT)])
    notes = provenance(words, ROOT)
    samples, plain = run_engine(args, "auto", console)
    _, eight = run_engine(args, "fp8", console)
    with args.out.open("w", encoding="utf-8", newline="") as file:
        for name, value in notes.items():
            file.write(f"# {name}: {value}\n")
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for preset in ("none", *args.presets):
            for number, sample in enumerate(samples):
                tokens, text, kept = plain[preset, number]
                tokens8, text8, kept8 = eight[preset, number]
                writer.writerow([
                    preset, number, sample.style, f"{sample.depth:.2f}", sample.num_tokens,
                    max((each.shape[2] for each in kept), default=""),
                    f"{jaccard(kept, kept8):.4f}" if kept else "",
                    int(sample.answer in text), int(sample.answer in text8), int(tokens == tokens8),
                ])  # fmt: skip


def show(args: argparse.Namespace) -> None:
    """Print the table."""
    with args.out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    print("| preset | Jaccard, mean (lowest prompt) | right, 16 bits | right, fp8 | same tokens |")
    print("|---|---|---|---|---|")
    for preset in dict.fromkeys(row["preset"] for row in rows):
        own = [row for row in rows if row["preset"] == preset]
        shares = [float(row["jaccard"]) for row in own if row["jaccard"]]
        cells = [f"{mean(shares):.3f} ({min(shares):.3f})" if shares else "–"]
        for column in ("right", "right_fp8"):
            count = sum(int(row[column]) for row in own)
            bounds = wilson(count, len(own))
            cells.append(
                f"{count} of {len(own)} ({100 * bounds.low:.0f}-{100 * bounds.high:.0f} %)"
            )
        cells.append(f"{sum(int(row['same']) for row in own)} of {len(own)}")
        name = "whole cache" if preset == "none" else f"`{preset}`"
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> int:
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("command", choices=["run", "show"])
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--model", type=Path, help="folder of the model, for run")
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=1440, help="tokens of a prompt")
    parser.add_argument("--ratio", type=float, default=0.12)
    parser.add_argument("--dtype", default="bfloat16", help="the model computes in it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "show":
        show(args)
    elif args.model is None:
        parser.error("run needs --model")
    else:
        run(args)
    return 0

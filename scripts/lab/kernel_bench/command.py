"""Time, bytes and bandwidth of the kernels, next to a device-to-device copy of the same run.

    python scripts/bench_kernels.py --out FOLDER
    python scripts/bench_kernels.py --out FOLDER --rows compact_pages token_scores_w32 \
        --tokens 32768 --batch 1 --prefill-seconds 2.9

Every row is checked against the plain torch version first, on fresh random data at a small ragged
size and, on a GPU, at the measured one. A row that fails prints its error and no speed, and the
exit code is 1. On a GPU, times are medians of events around the launcher (L2 cache cleared, host
time included where the device waits for it). On a CPU the Triton kernels are only checked, in
Triton's interpreter; all times there are of the torch versions.

Rows of whole prompts need vLLM and this package's other requirements; all others need torch and
triton. Tables are drawn with rich and plots with matplotlib where they are installed.
"""

import argparse
import csv
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lab.kernel_bench.device import ON_GPU  # first: before anything imports Triton
from lab.kernel_bench.inputs import Shape
from lab.kernel_bench.measure import (
    copy_bytes,
    matmul_size,
    measure_copy,
    measure_matmul,
    run_size,
    small_check,
)
from lab.kernel_bench.output import plot, show, show_results
from lab.kernel_bench.rows import BOTH, MODELS, ROWS, Result, Row, number, verdicts
from lab.places import ROOT
from vllm_kvcompress.evaluation.provenance import provenance, versions

COLUMNS = [
    "kernel", "provider", "model", "tokens", "batch", "metric", "unit", "median", "p20", "p80",
    "note", "device", "torch", "triton", "commit", "command",
]  # fmt: skip


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and command of this run, without paths of the machine."""
    words = [arg if arg != str(args.out) else args.out.name for arg in sys.argv[1:]]
    about = provenance(" ".join(["scripts/bench_kernels.py", *words]), ROOT, ON_GPU)
    found = versions(("torch", "triton", "xformers"))
    return {
        "device": about["device"],
        "torch": found["torch"],
        "triton": found["triton"],
        "xformers": found.get("xformers"),
        "cuda": torch.version.cuda if ON_GPU else None,
        "python": found["python"],
        "commit": args.commit or about["commit"],
        "started": about["started"],
        "command": about["command"],
        "seed": args.seed,
        "layout": args.layout,
        "copy_bytes": 2 * copy_bytes(),
    }


def sizes(row: Row, args: argparse.Namespace) -> Iterator[tuple[str, Shape]]:
    """Models and shapes a row is measured at."""
    tokens = args.tokens if row.by_tokens else args.tokens[:1]
    models = args.models if row.all_layers else [BOTH]
    for model in models:
        for batch in args.batch:
            for count in tokens:
                yield model, Shape(count, batch, MODELS.get(model, 1), layout=args.layout)


def run(args: argparse.Namespace, save: Callable[[Result], None]) -> tuple[list[Result], bool]:
    """All rows; whether all checks passed."""
    results, good, stop = [], True, time.monotonic() + args.time_limit
    for row in (ROWS[name] for name in args.rows):
        if row.missing:
            extra = ": outside check skipped" if row.needs == "xformers" else ""
            print(f"{row.name}: {row.missing}{extra}", flush=True)
            continue
        error, wrong = math.nan, ""
        try:
            error = small_check(row, args.seed, args.layout)
            if not error <= row.tolerance:
                wrong = f"WRONG by {error:.2g} at the small size"
        except Exception as problem:  # whatever a compiler or a driver has to say
            wrong = f"FAILED at the small size: {problem!r:.200}"
        print(f"{row.name}: {wrong or f'off by {error:.2g} at the small size'}", flush=True)
        for model, shape in sizes(row, args):
            result = Result(row, model, shape, error_small=error)
            results.append(result)
            if wrong:
                result.notes[row.provider] = wrong
            elif time.monotonic() > stop:
                result.notes = dict.fromkeys((row.provider, "torch"), "skipped: time limit")
            else:
                try:
                    run_size(result, args.seed + 1, not args.no_torch)
                except torch.OutOfMemoryError:
                    result.notes[row.provider] = "skipped: out of memory"
                except Exception as problem:
                    result.times.clear()
                    result.notes[row.provider] = f"FAILED: {problem!r:.200}"
                    print(f"{row.name}: {result.notes[row.provider]}", flush=True)
            good &= not result.is_red
            save(result)
            if wrong:
                break
    return results, good


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder for the results")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    lengths = [1024, 4096, 8192, 32768, 131072] if ON_GPU else [256, 1024, 4096]
    parser.add_argument("--tokens", type=int, nargs="+", default=lengths)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64] if ON_GPU else [1])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layout", choices=["LBNHC", "LBHNC"], default="LBNHC")
    parser.add_argument(
        "--prefill-seconds",
        type=float,
        help="of one 32k prompt, measured elsewhere (choose its model with --models)",
    )
    parser.add_argument("--no-torch", action="store_true", help="do not time the torch versions")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds for all rows")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--commit", help="where the checkout has no git")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out.name} exists: results are never overwritten")
    return args


def main() -> int:
    """Check, measure, write."""
    args = parse()
    if not ON_GPU:
        from vllm_kvcompress.host import cpu_triton

        cpu_triton.register()
        # With few cores, threads wait for each other longer than they compute.
        torch.set_num_threads(1)
        print("No GPU: Triton kernels are only checked; all times are of the torch versions.")
    about = describe(args)
    args.out.mkdir(parents=True)
    tail = [about[name] for name in ("device", "torch", "triton", "commit", "command")]
    copied = measure_copy()
    copy_gbps = about["copy_bytes"] / copied[0] / 1e6
    with (args.out / "kernels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        who = ["copy", "torch", "", "", ""]
        writer.writerow([*who, "time", "ms", *map(number, copied), "", *tail])
        writer.writerow([*who, "achieved", "GB/s", number(copy_gbps), "", "", "", *tail])
        product = measure_matmul()
        tflops = 2 * matmul_size() ** 3 / product[0] / 1e9
        who = ["matmul", "torch", "", "", ""]
        writer.writerow([*who, "time", "ms", *map(number, product), "", *tail])
        writer.writerow([*who, "achieved", "TFLOP/s", number(tflops), "", "", "", *tail])

        def save(result: Result) -> None:
            writer.writerows([*line, *tail] for line in result.columns(copy_gbps))
            file.flush()

        results, good = run(args, save)
    found = verdicts(results, copy_gbps, about["device"], args.prefill_seconds)
    about["verdicts"] = found
    about["bytes"] = {row.name: row.formula for row in ROWS.values()}
    text = json.dumps(about, indent=1) + "\n"
    (args.out / "run.json").write_text(text, encoding="utf-8")
    show_results(results, copy_gbps)
    show("Targets (on an H200)", ["row", "where", "asked", "measured", "verdict"], found)
    plot(results, copy_gbps, about, args.out / "kernels.png")
    return 0 if good else 1

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
import gc
import importlib.util
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
sys.path.append(str(ROOT))  # torch versions of some kernels are in tests/
if importlib.util.find_spec("vllm_kvcompress.kernels") is None:
    import vllm_kvcompress

    vllm_kvcompress.__path__.append(str(ROOT))  # an installation maps kernels/ into the package

from vllm_kvcompress.evaluation.kernel_bench import (  # noqa: E402
    BOTH,
    MODELS,
    NOT_MEASURED,
    ROWS,
    Result,
    Row,
    Times,
    difference,
    number,
    verdicts,
)
from vllm_kvcompress.evaluation.kernel_inputs import Case, Shape  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
QUANTILES = (0.5, 0.2, 0.8)
ONE_RUN_MS = 500.0  # where a torch version takes longer, the check's run is its time
COLUMNS = [
    "kernel", "provider", "model", "tokens", "batch", "metric", "unit", "median", "p20", "p80",
    "note", "device", "torch", "triton", "commit", "command",
]  # fmt: skip


# --- one row ------------------------------------------------------------------------------


def outputs(case: Case, launch: Callable[[], Any], poisons: bool) -> list[torch.Tensor]:
    """What a launch wrote, as tensors that stay as they are.

    New memory is filled with NaN and the largest integers first, so that what a kernel leaves out
    shows.
    """
    if case.spoil:
        case.spoil()
    torch.use_deterministic_algorithms(poisons, warn_only=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            found = launch()
    finally:
        torch.use_deterministic_algorithms(False)
    if case.outputs:
        return list(case.outputs(found))
    return list(found) if isinstance(found, tuple) else [found]


def check(case: Case) -> tuple[float, float]:
    """Largest difference of a row from its torch version, and milliseconds the latter took."""
    found = outputs(case, case.kernel, poisons=True)
    synchronize()
    started = time.perf_counter()
    wanted = outputs(case, case.reference, poisons=False)
    synchronize()
    elapsed = (time.perf_counter() - started) * 1e3
    pairs = zip(found, wanted, strict=True)
    return max(difference(one, other) for one, other in pairs), elapsed


def synchronize() -> None:
    """Wait for the device."""
    if ON_GPU:
        torch.cuda.synchronize()


def measure(run: Callable[[], Any]) -> Times:
    """Time of a call: by events on a GPU, by the clock on the wall on a CPU."""
    if ON_GPU:
        from triton.testing import do_bench

        median, low, high = do_bench(run, warmup=20, rep=100, quantiles=list(QUANTILES))
        return median, low, high
    times: list[float] = []
    stop = time.perf_counter() + ONE_RUN_MS / 1e3
    while not times or (time.perf_counter() < stop and len(times) < 100):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    found = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor(QUANTILES).double())
    median, low, high = found.tolist()
    return median, low, high


def measure_copy() -> Times:
    """Milliseconds of a copy on the device, of `copy_bytes()` read and as many written."""
    source = torch.empty(copy_bytes(), dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return measure(lambda: target.copy_(source))


def copy_bytes() -> int:
    """1 GiB on a GPU, many times its L2 cache; 256 MiB on a CPU."""
    return 1 << (30 if ON_GPU else 28)


def measure_matmul() -> Times:
    """Milliseconds of a product of two square matrices of `matmul_size()` rows in bfloat16."""
    shape = (matmul_size(), matmul_size())
    one, other = (torch.ones(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    for matrix in (one, other):
        matrix.normal_()
    return measure(lambda: one @ other)


def matmul_size() -> int:
    """Large enough for a GPU's peak rate; small on a CPU."""
    return 8192 if ON_GPU else 512


def small_check(row: Row, seed: int, layout: str) -> float:
    """Difference at a small size with requests of different lengths; float32 on a CPU."""
    # Triton's interpreter multiplies the bits of bfloat16 matrices.
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    shape = Shape(row.small, 2, 4, 2, 8, 64, dtype=dtype, layout=layout, ragged=True)
    if row.most(shape):
        shape = replace(shape, batch=1)
    return check(row.make(shape, generator(seed)))[0]


def generator(seed: int) -> torch.Generator:
    """Random numbers on the device."""
    return torch.Generator(DEVICE).manual_seed(seed)


def too_large(need: int) -> str | None:
    """Why a size is not measured, if the device's free memory is the reason."""
    if not ON_GPU:
        return None
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    need += 1 << 30
    return f"skipped: needs {need / 2**30:.0f} GiB" if need > free else None


def run_size(result: Result, seed: int, with_torch: bool) -> None:
    """Check and time a row at one size; what went wrong, or was left out, is in its notes."""
    row, shape = result.row, result.shape
    ours = row.provider
    reason = row.most(shape) or too_large(row.memory(shape))
    if not ON_GPU and shape.tokens > row.cpu_tokens:
        reason = "skipped: slow on a CPU"
    if reason:
        result.notes = {ours: reason, "torch": reason}
        return
    case = row.make(shape, generator(seed))
    expected = 0.0
    if ON_GPU:
        try:
            result.error, expected = check(case)
        except torch.OutOfMemoryError:
            note = "out of memory: checked at the small size alone"
            result.notes = {ours: note, "torch": note}
        else:
            if not result.error <= row.tolerance:
                result.notes[ours] = f"WRONG by {result.error:.2g} at this size"
                return
        result.times[ours] = measure(case.kernel)
    else:
        result.notes[ours] = f"{NOT_MEASURED}: checked in the interpreter"
    if expected > ONE_RUN_MS:
        result.times["torch"] = (expected,) * 3
    elif with_torch and "torch" not in result.notes:
        result.times["torch"] = measure(case.reference)


# --- tables, files, plot --------------------------------------------------------------------


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


# --- command line ---------------------------------------------------------------------------


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and command of this run, without paths of the machine."""
    from importlib.metadata import version

    import triton

    words = [arg if arg != str(args.out) else args.out.name for arg in sys.argv[1:]]
    return {
        "device": torch.cuda.get_device_name() if ON_GPU else processor(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "xformers": version("xformers") if importlib.util.find_spec("xformers") else None,
        "cuda": torch.version.cuda if ON_GPU else None,
        "python": platform.python_version(),
        "commit": args.commit or commit(),
        "command": " ".join(["scripts/bench_kernels.py", *words]),
        "seed": args.seed,
        "layout": args.layout,
        "copy_bytes": 2 * copy_bytes(),
    }


def processor() -> str:
    """The CPU's name, and the threads torch uses."""
    name = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"CPU {name}, torch threads: {torch.get_num_threads()}"


def commit() -> str:
    """Of the checkout; "+" behind it where files differ from it."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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


if __name__ == "__main__":
    sys.exit(main())

"""A long generation under a small budget: blocks held after every step, and the tokens.

    python scripts/long_generation.py run --out docs/benchmarks/long_generation_sync.csv
    python scripts/long_generation.py run --async-scheduling --out .../long_generation_async.csv
    python scripts/long_generation.py show SYNC.csv ASYNC.csv --plot long_generation.png

`run` steps a real engine (CPU, float32, the probe model). `show` compares tokens, says what
was held, and draws it; it exits with 1 if tokens differ or the bound does not hold.
"""

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

from lab.places import PROBE_MODEL
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.provenance import versions
from vllm_kvcompress.evaluation.tasks.needle import make_samples

PROMPT_TOKENS = 150
BLOCK_SIZE = 32


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """Compress every 128 generated tokens, and nothing at the end of the prompt."""
    return {
        "preset": args.preset,
        "budget": {"tokens": args.budget},
        "trigger": "interval",
        "interval": args.interval,
        "layer_groups": {"count": 1},
    }


def run(args: argparse.Namespace) -> bool:
    """Generate, and write one line per step."""
    engine = Engine(str(PROBE_MODEL), setting(args), async_scheduling=args.async_scheduling)
    sample = make_samples(1, PROMPT_TOKENS, engine.tokenize, seed=4)[0]
    engine.add("r", engine.tokenize(sample.prompt), args.max_tokens, ignore_eos=True)
    rows, started = [], time.monotonic()
    while engine.engine.has_unfinished_requests():
        engine.step()
        engine.scheduler.check_integrity()
        held = engine.num_usable_blocks - engine.pool.get_num_free_blocks()
        rows.append((engine.num_steps, len(engine.results["r"].token_ids), held))
        if engine.num_steps % 500 == 0:
            print(f"{engine.num_steps} steps, {time.monotonic() - started:.0f} s", flush=True)
    about = {
        **versions(),
        "setting": setting(args),
        "async_scheduling": args.async_scheduling,
        "prompt_tokens": len(engine.tokenize(sample.prompt)),
        "compactions": engine.scheduler.stats.compactions,
        "tokens": engine.results["r"].token_ids,
    }
    engine.close()
    with args.out.open("w", newline="", encoding="utf-8") as file:
        file.write("# " + json.dumps(about) + "\n")
        writer = csv.writer(file)
        writer.writerow(["step", "generated_tokens", "blocks_held"])
        writer.writerows(rows)
    return True


def read(path: Path) -> tuple[dict[str, Any], list[tuple[int, int, int]]]:
    """What was run, and its lines without the steps after which nothing was left."""
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    rows = [tuple(int(x) for x in row) for row in list(csv.reader(lines))[1:]]
    return json.loads(first[2:]), [row for row in rows if row[2]]  # type: ignore[misc]


def show(args: argparse.Namespace) -> bool:
    """Compare and draw."""
    runs = [read(path) for path in args.files]
    good = True
    for about, rows in runs:
        budget, interval = about["setting"]["budget"]["tokens"], about["setting"]["interval"]
        # The first trigger that finds more than the budget; from then on every interval is alike.
        first = next(
            g for g in range(interval, 10**9, interval) if about["prompt_tokens"] + g > budget
        )
        later = [held for _, generated, held in rows if generated > first + 1]
        survivors = -(-budget // BLOCK_SIZE)
        # Budget, an interval, and for one step both the old blocks and the survivors' new ones.
        bound = 2 * survivors + -(-interval // BLOCK_SIZE) + 2
        peaks = [max(later[i : i + interval]) for i in range(0, len(later) - interval, interval)]
        name = "async" if about["async_scheduling"] else "sync"
        print(
            f"{name:5} {len(about['tokens'])} tokens in {rows[-1][0]} steps, compactions "
            f"{about['compactions']}; after the first: {min(later)} to {max(later)} blocks of "
            f"{BLOCK_SIZE} held (bound {bound}), peak of every interval {sorted(set(peaks))}; "
            f"uncompressed at the end: {-(-(about['prompt_tokens'] + len(about['tokens'])) // 32)}"
        )
        good &= max(later) <= bound
    tokens = [about["tokens"] for about, _ in runs]
    same = sum(a == b for a, b in zip(tokens[0], tokens[-1], strict=True))
    print(f"{same} of {len(tokens[0])} tokens equal")
    if args.plot:
        plot(runs, args.plot)
    return good and same == len(tokens[0])


def plot(runs: list[tuple[dict[str, Any], list[tuple[int, int, int]]]], path: Path) -> None:
    """Blocks over generated tokens, beside what the sequence would need uncompressed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4))
    about, rows = runs[0]
    grown = [-(-(about["prompt_tokens"] + generated) // BLOCK_SIZE) for _, generated, _ in rows]
    axes.plot([g for _, g, _ in rows], grown, color="0.7", label="uncompressed (computed)")
    for about, rows in runs:
        name = "async" if about["async_scheduling"] else "sync"
        style = "--" if about["async_scheduling"] else "-"
        held = [h for *_, h in rows]
        axes.plot([g for _, g, _ in rows], held, style, label=f"held, {name}")
    axes.set_xlabel("generated tokens")
    axes.set_ylabel(f"blocks of {BLOCK_SIZE} tokens")
    axes.set_title(
        f"{about['setting']['preset']}, budget {about['setting']['budget']['tokens']}, "
        f"every {about['setting']['interval']} tokens"
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("run")
    first.add_argument("--out", type=Path, required=True)
    first.add_argument("--preset", default="rkv")
    first.add_argument("--budget", type=int, default=512)
    first.add_argument("--interval", type=int, default=128)
    first.add_argument("--max-tokens", type=int, default=8000)
    first.add_argument("--async-scheduling", action="store_true")
    second = commands.add_parser("show")
    second.add_argument("files", type=Path, nargs="+")
    second.add_argument("--plot", type=Path)
    args = parser.parse_args()
    return 0 if {"run": run, "show": show}[args.command](args) else 1

"""Time of a decode step whose layers read codebooks, against one that reads the same tokens plain.

    python scripts/bench_codebook.py --out FOLDER
    python scripts/bench_codebook.py --out FOLDER --model DIR --dtype bfloat16 --prompt-tokens 32000

One engine, three kinds of requests in turns (`vllm_xargs`): uncompressed, `spindlekv-evict`, and
the same eviction with every layer group coded. Writes steps.csv and run.json into a new folder. Per
kind: blocks held once prompts are compacted (exact), milliseconds per decode step, and of these in
attention layers. Without a GPU, vLLM's bookkeeping runs in Triton's interpreter and is most of a
step; attention is compiled (vLLM's) or plain torch (codebooks).
"""

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lab.places import PROBE_MODEL, ROOT
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.provenance import provenance, public_words
from vllm_kvcompress.evaluation.tasks.needle import make_samples

KINDS = ("none", "spindlekv-evict", "spindlekv")
STEPS, RUN = "steps.csv", "run.json"


class AttentionTimer:
    """Time spent in attention layers: on the host, or between events of a GPU."""

    def __init__(self, layers: dict[str, Any]) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.seconds = 0.0
        self.events: list[Any] = []
        for layer in layers.values():
            layer.impl.forward = self._timed(layer.impl.forward)

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._measured():
                return forward(*args, **kwargs)

        return timed

    @contextmanager
    def _measured(self) -> Iterator[None]:
        if not self.on_gpu:
            start = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - start
            return
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        yield
        pair[1].record()
        self.events.append(pair)

    def take(self) -> float:
        """Seconds since the last call."""
        if self.on_gpu:
            torch.cuda.synchronize()
            self.seconds += sum(a.elapsed_time(b) for a, b in self.events) / 1e3
            self.events = []
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def one_round(
    engine: Engine, timer: AttentionTimer, kind: str, prompts: list[list[int]], args: Any
) -> dict[str, float]:
    """Decode a batch of one kind; prompts and their compactions are not timed."""
    # The server's own setting, unlike the preset of its name, codes all layer groups.
    xargs: dict[str, Any] = {} if kind == "spindlekv" else {"kv_compression": kind}
    if kind != "none":
        xargs["kv_budget_ratio"] = args.ratio
    before = engine.num_steps
    for index, prompt in enumerate(prompts):
        engine.add(f"{kind}-{before}-{index}", prompt, args.steps + 8, xargs, ignore_eos=True)
    while any(r.num_output_tokens < 3 for r in engine.scheduler.requests.values()):
        engine.step()
    held = engine.num_usable_blocks - engine.pool.get_num_free_blocks()
    steps, attention = [], []
    timer.take()
    for _ in range(args.steps):
        start = time.perf_counter()
        engine.step()
        attention.append(timer.take())  # waits for the GPU
        steps.append(time.perf_counter() - start)
    engine.drain()
    return {
        "blocks": held,
        "step_ms": statistics.median(steps) * 1e3,
        "attention_ms": statistics.median(attention) * 1e3,
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all batch sizes, rounds and kinds; kinds take turns."""
    setting = {
        "preset": "spindlekv",
        "codebook": {"shallow": 1.0, "entries": args.entries, "extend": False},
    }
    engine = Engine(
        args.model, setting, dtype=args.dtype, block_size=args.block_size,
        max_num_batched_tokens=max(2048, max(args.batch)), enable_prefix_caching=False,
        max_model_len=args.prompt_tokens + args.steps + 512,
        kv_cache_memory_bytes=int(args.kv_memory * 2**30),
    )  # fmt: skip
    rows = []
    try:
        timer = AttentionTimer(engine.runner.compacted_layers.by_name())
        samples = make_samples(max(args.batch), args.prompt_tokens, engine.tokenize, seed=args.seed)
        prompts = [engine.tokenize(sample.prompt) for sample in samples]
        for batch in args.batch:
            for number in range(args.rounds + 1):
                for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
                    found = one_round(engine, timer, kind, prompts[:batch], args)
                    if number:  # the first round warms up
                        rows.append({"batch": batch, "kind": kind, "round": number, **found})
    finally:
        engine.close()
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Medians over rounds, and the ratio to the same tokens kept plain, round by round."""
    table = Table(title="One decode step")
    for name in ("batch", "requests", "blocks", "ms per step", "in attention", "attention / plain"):
        table.add_column(name, justify="right")
    for batch, kind in dict.fromkeys((row["batch"], row["kind"]) for row in rows):
        mine = [row for row in rows if (row["batch"], row["kind"]) == (batch, kind)]
        plain = {
            row["round"]: row["attention_ms"]
            for row in rows
            if (row["batch"], row["kind"]) == (batch, "spindlekv-evict")
        }
        ratios = sorted(row["attention_ms"] / plain[row["round"]] for row in mine)
        medians = [statistics.median(row[n] for row in mine) for n in ("step_ms", "attention_ms")]
        table.add_row(
            str(batch), kind, str(mine[0]["blocks"]), *(f"{value:.2f}" for value in medians),
            f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
        )  # fmt: skip
    Console().print(table)


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--model", default=str(PROBE_MODEL))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--ratio", type=float, default=0.5, help="tokens that survive")
    parser.add_argument("--entries", type=float, default=0.25, help="entries per coded token")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--kv-memory", type=float, default=1.0, help="GiB")
    parser.add_argument("--steps", type=int, default=24, help="timed per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out: {args.out} exists; name a new folder")
    command = " ".join(["python", *public_words(sys.argv, ROOT)])
    run = provenance(command, ROOT)  # the checkout may change meanwhile
    rows = measure(args)
    args.out.mkdir(parents=True)
    with (args.out / STEPS).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    about = {
        **run,
        "arguments": {**vars(args), "out": args.out.name, "model": Path(args.model).name},
    }
    text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    (args.out / RUN).write_text(text, encoding="utf-8")
    print_table(rows)
    return 0

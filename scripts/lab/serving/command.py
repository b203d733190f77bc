"""Stock vLLM against the plugin, in turns, over the same requests.

Starts ``vllm serve`` twice, once without this plugin and once with ``--kv-compression``, on models
of real size with dummy weights, and sends both the same prompts in turns: stock, none, 50 %,
25 %, 12 %, 6 %, in another order each round. Prints throughput, times, peak concurrency,
preemptions and KV bytes per request as ratios to stock, in an ample and in a tight pool, and
writes a CSV, a JSON and a plot.

    python scripts/bench_serving.py --out results                     # GPU, or small on CPU
    python scripts/bench_serving.py --out results --models qwen3-8b --prompt-lens 32768
    python scripts/bench_serving.py --out results -- --max-num-batched-tokens 4096

docs/benchmarks/README.md explains every column. The exit code is 0 if everything was measured.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console

from lab.errors import RunError
from lab.places import LOGS, ROOT
from lab.servers import (
    free_port,
    has_nvidia_gpu,
    log_tail,
    progress,
    running_server,
    stock_plugins,
    wait_until_ready,
)
from lab.serving import arithmetic, client
from lab.serving import report as reports
from lab.serving.arithmetic import POOLS, STOCK, Scenario
from lab.serving.client import BenchError, Server
from lab.serving.models import MODELS, block_bytes, weight_bytes, write_model
from lab.serving.report import Results, Row
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.provenance import gpu_memory, provenance, public_words
from vllm_kvcompress.lengths.sizing import parse_size

START_LIMIT = 1200
"""Seconds a server may take to start; a large model is compiled and captured first."""

# What an option is where it is not given.
PRESETS: dict[str, dict[str, Any]] = {
    "gpu": {
        "models": ["llama-3-8b", "qwen3-8b"],
        "prompt_lens": [8192, 32768, 131072],
        "output_len": 256,
        "requests": 0,
        "rounds": 5,
        "warmups": 1,
        "tight_fraction": 0.25,
        "block_size": 16,
    },
    "cpu": {
        "models": ["tiny"],
        "prompt_lens": [1024],
        "output_len": 16,
        "requests": 6,
        "rounds": 3,
        "warmups": 1,
        "tight_fraction": 0.5,
        "block_size": 32,
    },
}

# --- servers ------------------------------------------------------------------------------


def server_command(
    args: argparse.Namespace, scenario: Scenario, side: str, folder: Path, port: int
) -> list[str]:
    """The command line of one server.

    Both get the same bytes, not the same ``--num-gpu-blocks-override``: with layer groups a block
    of the plugin's pool is that much smaller, and equal numbers would be unequal pools.
    """
    max_len = scenario.prompt_len + scenario.output_len
    # The module, not the command: where packages lie in a folder of their own there is none.
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    command += ["--served-model-name", scenario.model, "--load-format", "dummy"]
    command += ["--dtype", MODELS[scenario.model]["dtype"]]  # vLLM would make float32 less
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(max_len)]
    command += ["--max-num-seqs", str(scenario.num_requests)]
    command += ["--block-size", str(scenario.block_size)]
    command += ["--kv-cache-memory-bytes", str(scenario.pool_bytes)]
    if args.on_gpu:
        # Does not size the pool; vLLM only refuses to start where less than this share is free.
        command += ["--gpu-memory-utilization", "0.1"]
    else:
        command += ["--enforce-eager"]
    if side != STOCK:
        command += ["--kv-compression", args.kv_compression]
    return [*command, *args.server_args]


def environment(side: str) -> dict[str, str]:
    """What a server's environment has more than ours."""
    changes = {"VLLM_SERVER_DEV_MODE": "1"}  # POST /reset_prefix_cache
    if side == STOCK:
        changes["VLLM_PLUGINS"] = stock_plugins()
    return changes


@contextlib.contextmanager
def shown_if_dead(process: Any, log: Path, side: str) -> Iterator[None]:
    """Where something goes wrong and the server is dead, show the end of its log."""
    try:
        yield
    except (RunError, BenchError):
        with contextlib.suppress(Exception):
            process.wait(2)  # the API server needs a moment after its engine died
        if process.poll() is not None:
            print(f"--- end of {log} ({side}) ---\n{log_tail(log, 40)}\n---", file=sys.stderr)
        raise


@contextlib.contextmanager
def started(
    args: argparse.Namespace, scenario: Scenario, side: str, folder: Path, console: Console
) -> Iterator[Server]:
    """Run one server until the end of the block."""
    port = free_port()
    command = server_command(args, scenario, side, folder, port)
    log, url = LOGS / f"bench_{side}.log", f"http://127.0.0.1:{port}"
    print(f"starting {side}: {' '.join(public_words(command, ROOT))}", flush=True)
    with contextlib.ExitStack() as stack:
        with patch.dict(os.environ, environment(side)):  # `running_server` hands ours on
            process = stack.enter_context(running_server(command, log))
        stack.enter_context(shown_if_dead(process, log, side))
        with progress(console) as show:
            wait_until_ready(process, url, log, show, limit=START_LIMIT)
        server = asyncio.run(client.describe(side, url))
        check_blocks(server, scenario)
        yield server


def check_blocks(server: Server, scenario: Scenario) -> None:
    """Refuse a stock server whose blocks have another size than the pools were computed with."""
    expected = block_bytes(scenario.model, scenario.block_size)
    if server.side == STOCK and round(server.block_bytes) != expected:
        raise BenchError(
            f"A block of the stock server has {server.block_bytes:g} bytes, expected {expected}; "
            "arguments after -- must not change --dtype, --kv-cache-dtype or --block-size."
        )


# --- measuring ----------------------------------------------------------------------------


def run_batch(
    args: argparse.Namespace,
    scenario: Scenario,
    batch: arithmetic.Batch,
    servers: dict[str, Server],
    add: Callable[[list[Row]], None],
    probed: set[str],
) -> None:
    """Everything that is measured while these servers run."""
    for variant in dict.fromkeys(variant for _, variant in batch.work):
        held = client.probe(servers[arithmetic.side_of(variant)], scenario, variant, args.seed)
        if variant not in probed:
            probed.add(variant)
            add([Row(scenario, 0, 0, variant, "kv_bytes_per_request", held)])
    position, last = 0, None
    for number, variant in batch.work:
        position, last = (position + 1 if number == last else 1), number
        prompts = client.make_prompts(scenario, number, args.seed + 1, scenario.num_requests)
        found = client.measure(servers[arithmetic.side_of(variant)], scenario, variant, prompts)
        name = f"round {number}" if number > 0 else "warm-up"
        print(f"  {scenario.title}, {name}, {variant}: {found['duration']:.1f} s", flush=True)
        if number > 0:
            add([Row(scenario, number, position, variant, k, v) for k, v in found.items()])


def run_scenario(
    args: argparse.Namespace,
    scenario: Scenario,
    console: Console,
    add: Callable[[list[Row]], None],
) -> None:
    """Start servers, measure all rounds of all variants, stop the servers."""
    variants = [STOCK, *args.variants]
    probed: set[str] = set()
    with tempfile.TemporaryDirectory() as name:
        max_len = scenario.prompt_len + scenario.output_len
        folder = write_model(Path(name) / scenario.model, scenario.model, max_len)
        for batch in arithmetic.plan(variants, args.rounds, args.warmups, args.one_at_a_time):
            with contextlib.ExitStack() as stack:
                # One after the other: on a GPU each looks at the free memory while it starts.
                servers = {
                    side: stack.enter_context(started(args, scenario, side, folder, console))
                    for side in batch.sides
                }
                run_batch(args, scenario, batch, servers, add, probed)


def make_scenarios(args: argparse.Namespace) -> list[Scenario]:
    """Every combination of model, prompt length and pool, with its batch and its bytes."""
    copy = arithmetic.largest_ratio(args.variants)
    scenarios = []
    for model in args.models:
        per_block = block_bytes(model, args.block_size)
        for prompt_len in args.prompt_lens:
            blocks = arithmetic.request_blocks(prompt_len, args.output_len, args.block_size)
            number = args.requests or arithmetic.batch_size(
                kv_memory(args, model), blocks * per_block, copy
            )
            for pool in args.pools:
                size = arithmetic.pool_blocks(number, pool, args.tight_fraction, blocks, copy)
                lengths = (prompt_len, args.output_len, number, args.block_size)
                scenarios.append(Scenario(model, pool, *lengths, size * per_block))
    return scenarios


def kv_memory(args: argparse.Namespace, model: str) -> int:
    """Bytes for one server's KV cache, given or from the GPU's size."""
    if args.kv_memory:
        return args.kv_memory
    if not args.on_gpu:
        raise ConfigError("--kv-memory: without a GPU give it, or --requests.")
    num_servers = 1 if args.one_at_a_time else 2
    return arithmetic.kv_memory_default(gpu_memory(), weight_bytes(model), num_servers)


# --- the run ------------------------------------------------------------------------------


def about_run(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Where the numbers come from, without this machine's paths."""
    options = {key: value for key, value in vars(args).items() if key not in ("out", "on_gpu")}
    options["kv_compression"] = public_words([args.kv_compression], ROOT)[0]
    command = " ".join(["python", "scripts/bench_serving.py", *public_words(argv, ROOT)])
    return {
        **provenance(command, ROOT, args.on_gpu),
        "options": {**options, "server_args": public_words(args.server_args, ROOT)},
    }


def report(
    args: argparse.Namespace,
    console: Console,
    about: dict[str, Any],
    results: Results,
    complete: bool,
) -> None:
    """Print tables and verdicts, write JSON and plot."""
    for scenario in results.scenarios:
        console.print(reports.make_table(results, scenario))
    for scenario in results.scenarios:
        print(reports.verdict_line(results, scenario))
    if not args.on_gpu:
        print("Times are of Triton's interpreter on a CPU: only the counts mean anything.")
    found = {**about, "complete": complete, "scenarios": reports.summary(results)}
    (args.out / "serving.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    reports.write_plot(args.out / "serving.png", results, about["device"])
    print(f"Results are in {args.out}.")


def run(args: argparse.Namespace, argv: list[str], console: Console) -> None:
    """Measure everything; what was measured is reported even if something fails later."""
    reports.check_new_folder(args.out)
    if parse_config(args.kv_compression) is None:
        raise ConfigError("--kv-compression: none is always measured; name a preset or a file.")
    scenarios = make_scenarios(args)
    about = about_run(args, argv)
    args.out.mkdir(parents=True)
    results, log = Results(), reports.CsvLog(args.out / "serving.csv", about)

    def add(rows: list[Row]) -> None:
        results.rows += rows
        log.write(rows)

    complete = False
    try:
        for scenario in scenarios:
            run_scenario(args, scenario, console, add)
        complete = True
    finally:
        log.close()
        if results.rows:
            report(args, console, about, results, complete)
        else:
            shutil.rmtree(args.out)  # holds a header; would only be in the way of the next try


def checked(
    convert: Callable[[str], Any], good: Callable[[Any], bool], rule: str
) -> Callable[[str], Any]:
    """Make an argparse type that says what is allowed."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except (ConfigError, ValueError):
            value = None
        if value is None or not good(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return value

    return parse


POSITIVE = checked(int, lambda n: n >= 1, "a whole number from 1 up")
COUNT = checked(int, lambda n: n >= 0, "a whole number from 0 up")
SHARE = checked(float, lambda x: 0 < x < 1, "a number above 0 and below 1")
SIZE = checked(parse_size, lambda n: n > 0, "a size such as 40GiB")
VARIANT = checked(arithmetic.parse_variant, bool, "none or a ratio above 0 and below 1")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Read the command line and fill in what the preset says."""
    parser = argparse.ArgumentParser(
        description="Stock vLLM against the plugin, in turns, over the same requests.",
        epilog="Arguments after -- go to both servers.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="a folder that does not exist yet")
    add("--preset", choices=["auto", *PRESETS], default="auto", help="auto: gpu if there is one")
    add("--kv-compression", default="windowkv", metavar="PRESET|FILE.yaml")
    add("--models", nargs="+", choices=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    add("--prompt-lens", nargs="+", type=POSITIVE, metavar="N")
    add("--output-len", type=POSITIVE, metavar="N", help="at least 4")
    add(
        "--variants",
        nargs="+",
        type=VARIANT,
        default=["none", "0.5", "0.25", "0.12", "0.06"],
        help="beside stock: none, and shares of the prompt to keep",
    )
    add("--pools", nargs="+", choices=POOLS, default=list(POOLS))
    add("--tight-fraction", type=SHARE, help="share of the batch a tight pool has room for")
    add("--requests", type=POSITIVE, help="size of the batch (default: what fits --kv-memory)")
    add("--kv-memory", type=SIZE, help="KV cache of one server, such as 40GiB")
    add("--block-size", type=POSITIVE)
    add("--rounds", type=POSITIVE)
    add("--warmups", type=COUNT, help="rounds before, not counted")
    add("--one-at-a-time", action="store_true", help="restart servers each round, never run two")
    add("--seed", type=int, default=0)
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.server_args, args.on_gpu = argv[cut + 1 :], has_nvidia_gpu()
    preset = PRESETS[("gpu" if args.on_gpu else "cpu") if args.preset == "auto" else args.preset]
    if args.kv_memory and args.requests is None:
        args.requests = 0
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.output_len < 4:
        parser.error("--output-len: at least 4, or there are no times per token to take.")
    return args


def main() -> int:
    """Entry point."""
    argv = sys.argv[1:]
    args = parse_args(argv)
    # As in demo.py: a shell may have SIGINT ignored, and SIGTERM must stop the servers, too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        run(args, argv, console)
    except (BenchError, ConfigError, RunError) as error:
        print(f"bench_serving: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbench_serving: interrupted; the servers were stopped.", file=sys.stderr)
        return 130
    return 0

"""Serve a model with its KV cache compressed, and ask it for numbers hidden in long prompts.

Starts ``vllm serve MODEL --kv-compression PRESET``, asks through /v1/completions and
/v1/chat/completions, and shows answers beside what the server's own /metrics say: tokens kept,
blocks given back, and blocks held while the same prompt is decoded with and without compression.
The exit code is 0 only if every answer is right and every request gave blocks back.

The model is SmolLM2-135M-Instruct, fetched once (scripts/smollm2.py); where it cannot be had, or
with ``--model probe``, it is the probe model of examples/, which can do nothing but this.

    scripts/demo.sh
    scripts/demo.sh --model probe --preset snapkv --json results.json
"""

import argparse
import contextlib
import json
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
from rich.console import Console

from lab.demo.client import ENDPOINTS, Client
from lab.demo.metrics import block_bytes
from lab.demo.questions import chat_questions, choose_model, probe_questions
from lab.demo.results import Row, make_table, measure, results_json, summary
from lab.errors import RunError
from lab.places import LOGS
from lab.servers import (
    free_port,
    has_nvidia_gpu,
    log_tail,
    progress,
    running_server,
    wait_until_ready,
)
from vllm_kvcompress.errors import ConfigError

LOG_FILE = LOGS / "server.log"

CACHE_MIB = {"probe": 256, "other": 1024}
"""Of KV cache: a token of SmolLM2 takes 45 KiB in float32, one of the probe model 2 KiB."""


def server_command(
    model: str, preset: str, port: int, on_gpu: bool, cache_mib: int = CACHE_MIB["probe"]
) -> list[str]:
    """The command line of the server."""
    vllm = str(Path(sys.executable).parent / "vllm")
    command = [vllm, "serve", model, "--kv-compression", preset]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "8192", "--max-num-seqs", "8"]
    command += ["--kv-cache-memory-bytes", str(cache_mib * 2**20)]
    if not on_gpu:
        command += ["--dtype", "float32", "--enforce-eager"]
    return command


def ask_all(client: Client, args: argparse.Namespace, is_probe: bool) -> list[Row]:
    """Ask every question, one at a time."""
    print(f"making {args.questions} prompts of about {args.prompt_tokens} tokens", flush=True)
    try:
        questions = probe_questions(args, client.tokenize) if is_probe else chat_questions(args)
    except (ValueError, OSError, ConfigError) as error:
        raise RunError(f"{str(error).rstrip('.')}.") from None
    rows = []
    for number, question in enumerate(questions, 1):
        print(
            f"asking {number}/{len(questions)} through {ENDPOINTS[question.endpoint]}", flush=True
        )
        rows.append(measure(client, question))
    return rows


def report(console: Console, args: argparse.Namespace, client: Client, rows: list[Row]) -> int:
    """Show and write the results; return the exit code."""
    console.print(make_table(rows))
    for line in summary(rows, block_bytes(client.metrics())):
        print(line)
    if args.json:
        args.json.write_text(json.dumps(results_json(args, client, rows), indent=2) + "\n")
        print(f"Results are in {args.json}.")
    return 0 if all(row.passed for row in rows) else 1


def run(args: argparse.Namespace, console: Console) -> int:
    """Start the server, ask, report; return the exit code."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    try:
        args.model, is_probe = choose_model(args.model, console)
        command = args.server_command or server_command(
            args.model,
            args.preset,
            port,
            on_gpu=has_nvidia_gpu(),
            cache_mib=CACHE_MIB["probe" if is_probe else "other"],
        )
        print(f"starting: {shlex.join(command)}", flush=True)
        with running_server(command, LOG_FILE) as process, shown_log(LOG_FILE):
            with progress(console) as show:
                wait_until_ready(process, url, LOG_FILE, show)
            client = Client(url)
            return report(console, args, client, ask_all(client, args, is_probe))
    except RunError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def shown_log(log_file: Path) -> Iterator[None]:
    """Show the end of the server's log if something goes wrong, before it is told to stop."""
    try:
        yield
    except (RunError, httpx.HTTPError) as error:
        print(f"--- end of {log_file} ---\n{log_tail(log_file)}\n---", file=sys.stderr)
        if isinstance(error, RunError):
            raise
        raise RunError(f"The server stopped answering: {error}.") from None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Ask a server with a compressed KV cache.")
    text = "smollm2, probe, or a folder (default: SmolLM2 where it can be fetched, else probe)"
    parser.add_argument("--model", help=text)
    parser.add_argument("--preset", default="auto", help="of --kv-compression")
    parser.add_argument("--questions", type=int, default=4, help="how many (default: 4)")
    parser.add_argument("--prompt-tokens", type=int, default=2000, help="default: 2000")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other prompts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    # For tests: run this instead of vLLM.
    parser.add_argument("--server-command", type=shlex.split, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> int:
    """Entry point."""
    args = parse_args()
    # Installed here because a shell that starts us in the background has SIGINT ignored, and
    # because a plain SIGTERM would leave the server running.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    # The table needs about 110 columns, more than rich assumes where there is no terminal.
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        return run(args, console)
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the server was stopped.", file=sys.stderr)
        return 130

"""Thousands of requests of OpenAI's package at a server that compresses, and SIGTERM at the end.

Starts ``vllm serve MODEL --kv-compression ...`` with a pool that is too small, asks every question
alone, then all of them many times at once: streamed or not, of random lengths, under policies,
budgets and priorities of their own, in conversations, over shared prefixes, several samples or
prompts a request, with clients that go away. Every token that comes back must be the one that came
alone, and where nothing is evicted the one of stock vLLM. Memory of all processes, the block pool
and the books of scheduler and worker must be in the end what they were. Then SIGTERM under load.

    python scripts/soak.py --out soak                              # 2,000 requests
    python scripts/soak.py --requests 200 --seed 3 --model DIR -- --num-gpu-blocks-override 80
    python scripts/soak.py --requests 300 --fault token            # must fail

The exit code is 0 if everything held. soak.json has every failure with its request.
"""

import argparse
import asyncio
import contextlib
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from subprocess import Popen
from unittest.mock import patch

from rich.console import Console

from lab.errors import RunError
from lab.gpu_check.runner import write_json
from lab.places import LOGS, PROBE_MODEL, ROOT
from lab.servers import (
    free_port,
    has_nvidia_gpu,
    log_tail,
    progress,
    running_server,
    stock_plugins,
    wait_until_ready,
)
from lab.soak import inside
from lab.soak.client import Client
from lab.soak.ending import TAIL, terminate
from lab.soak.findings import Report, hold_against_stock
from lab.soak.processes import Watch
from lab.soak.questions import LOSSLESS, Question, Questions, Request, draw_requests
from lab.soak.report import as_json, shown, table
from lab.soak.run import Show, Soak
from lab.soak.settings import SETTINGS
from vllm_kvcompress.config.reading import preset_names
from vllm_kvcompress.evaluation.provenance import provenance, public_words

NAME = "soak"
"""The server's name for the model."""
OPTIONS = [
    *["--max-model-len", "1024", "--max-num-seqs", "12", "--max-num-batched-tokens", "384"],
    *["--block-size", "32", "--dtype", "float32", "--num-gpu-blocks-override", "36"],
    *["--kv-cache-memory-bytes", "256M", "--scheduling-policy", "priority"],
]
"""Of 35 usable blocks the longest sequence needs 32: there are preemptions."""
START_LIMIT = 900
SHUTDOWN_TIMEOUT = "--shutdown-timeout"


def server_command(
    model: str, port: int, extra: Sequence[str], compression: Sequence[str]
) -> list[str]:
    """The command line of a server."""
    # The module, not the command: where packages lie in a folder of their own there is none.
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), *OPTIONS]
    if not has_nvidia_gpu():
        command += ["--enforce-eager"]
    return [*command, *compression, *extra]


@contextlib.contextmanager
def started(
    command: list[str], environment: Mapping[str, str], log: Path, url: str, console: Console
) -> Iterator[Popen[bytes]]:
    """Run a server until the end of the block."""
    with contextlib.ExitStack() as stack:
        with patch.dict(os.environ, environment, clear=True):  # `running_server` hands ours on
            process = stack.enter_context(running_server(command, log))
        try:
            with progress(console) as show:
                wait_until_ready(process, url, log, show, START_LIMIT)
        except RunError:
            print(f"--- end of {log} ---\n{log_tail(log)}\n---", file=sys.stderr)
            raise
        yield process


async def presets_of(client: Client) -> list[str]:
    """Presets that requests to this server may name."""
    found = []
    for name in preset_names():
        question = Question(name, "preset", [5, 6, 7], 1, {"kv_compression": name})
        answer = await client.ask(question, Request(0, name, max_tokens=1))
        if answer.outcome == "finished":
            found.append(name)
    return found


async def stock_answers(
    client: Client, questions: Sequence[Question]
) -> dict[str, list[list[int]]]:
    """What a server without compression says to each, asked alone."""
    found = {}
    for question in questions:
        asked = question.stock()
        answer = await client.ask(asked, Request(0, asked.name, max_tokens=asked.max_tokens))
        if answer.outcome != "finished":
            raise RunError(f"stock vLLM, {question.name}: {answer.outcome}: {answer.error}")
        found[question.name] = answer.tokens
    return found


def compared_with_stock(questions: Sequence[Question]) -> list[Question]:
    """The lossless ones, which must be equal, and as many of which many must not be."""
    lossless = [each for each in questions if each.kind in LOSSLESS]
    others = [each for each in questions if each.kind in ("server", "preset", "budget")]
    return lossless + others[: len(lossless)]


async def ask_stock(port: int, questions: Sequence[Question]) -> dict[str, list[list[int]]]:
    """The same, with a client of its own."""
    client = Client(f"http://127.0.0.1:{port}", NAME)
    try:
        return await stock_answers(client, compared_with_stock(questions))
    finally:
        await client.close()


async def soak(
    args: argparse.Namespace, process: Popen[bytes], client: Client, folder: Path, run_of: "Filled"
) -> None:
    """Everything that happens while the compressing server runs."""
    try:
        watch = Watch(process.pid)
        watch.look()
        setting = SETTINGS[args.setting]
        drawn = Questions(args.seed, await presets_of(client))
        questions = drawn.draw(args.questions, setting.without)
        requests = draw_requests(args.seed, questions, args.requests + TAIL)
        run_of.run = run = Soak(client, watch, folder, run_of.report, run_of.show, args.concurrency)
        run.depends_on_load = setting.depends_on_load
        await run.alone(questions)
        await run.load(requests[: args.requests], 60 * args.minutes)
        await terminate(run, process, requests[args.requests :], args.shutdown_timeout)
    finally:
        await client.close()


class Filled:
    """What a soak leaves, whatever ends it.

    Attributes
    ----------
    report : Report
        What came of it.
    run : Soak or None
        Its questions and references.
    show : callable
        As `lab.soak.run.Show`.
    """

    def __init__(self, report: Report, show: Show) -> None:
        self.report, self.show = report, show
        self.run: Soak | None = None


def run(args: argparse.Namespace, console: Console) -> Report:
    """Both servers, one after the other."""
    report = Report(seed=args.seed)
    LOGS.mkdir(exist_ok=True)
    with shown(console) as show, tempfile.TemporaryDirectory() as name:
        filled, folder = Filled(report, show), Path(name)
        port, log = free_port(), LOGS / "soak.log"
        url = f"http://127.0.0.1:{port}"
        command = server_command(args.model, port, args.server_args, SETTINGS[args.setting].flags)
        command += [SHUTDOWN_TIMEOUT, str(args.shutdown_timeout)]
        report.about = provenance(args.command, ROOT, has_nvidia_gpu())
        words = [f"{name}={value}" for name, value in inside.NO_COMPILED_SHAPES.items()]
        report.about["server"] = " ".join([*words, public_command(command, port)])
        console.print(f"starting: {report.about['server']}", highlight=False, soft_wrap=True)
        environment = inside.environment(folder, args.fault)
        start = time.monotonic()
        with started(command, environment, log, url, console) as process:
            report.seconds["start"] = time.monotonic() - start
            try:
                asyncio.run(soak(args, process, Client(url, NAME), folder, filled))
            except Exception as error:  # what was found before it must not be lost
                report.fail("ended early", f"{type(error).__name__}: {error}")
                console.print_exception()
                console.print(f"--- end of {log} ---\n{log_tail(log)}\n---", highlight=False)
        if args.stock and filled.run is not None:
            try:
                hold_against(args, filled.run, console)
            except RunError as error:
                report.fail("stock", f"{error}")
    return report


def hold_against(args: argparse.Namespace, run: Soak, console: Console) -> None:
    """The lossless answers, and as many others, against those of a server without compression."""
    questions = [run.questions[name] for name in run.references]
    port = free_port()
    command = server_command(args.model, port, args.server_args, [])
    environment = {**os.environ, "VLLM_PLUGINS": stock_plugins()}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    url = f"http://127.0.0.1:{port}"
    with started(command, environment, LOGS / "soak_stock.log", url, console):
        stock = asyncio.run(ask_stock(port, questions))
    lossless = SETTINGS[args.setting].is_lossless
    hold_against_stock(run.report, questions, run.references, stock, lossless)


def public_command(command: Sequence[str], port: int) -> str:
    """Without this machine's paths and port."""
    words = public_words(command[command.index("serve") :], ROOT)
    dropped = ("--port", str(port), "--host", "127.0.0.1")
    return shlex.join(["vllm", *(word for word in words if word not in dropped)])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    words = sys.argv[1:] if argv is None else argv
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description="Soak a server that compresses.", epilog="Behind --: flags of vllm serve."
    )
    parser.add_argument("--model", default=str(PROBE_MODEL), help="default: the probe model")
    parser.add_argument("--requests", type=int, default=2000, help="under load (default: 2000)")
    text = "send no more after so long; what was sent is checked (default: no limit)"
    parser.add_argument("--minutes", type=float, default=float("inf"), help=text)
    parser.add_argument("--questions", type=int, default=100, help="asked alone (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other requests")
    text = "what the server compresses when, or drafts over (default: both)"
    parser.add_argument("--setting", choices=SETTINGS, default="both", help=text)
    parser.add_argument("--concurrency", type=int, default=20, help="requests at once (20)")
    text = "vLLM's: seconds in which requests may still end after SIGTERM (120)"
    parser.add_argument(SHUTDOWN_TIMEOUT, type=int, default=120, help=text)
    parser.add_argument("--no-stock", dest="stock", action="store_false", help="no stock server")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write soak.json here")
    text = "break the server on purpose; the soak must fail: " + "; ".join(
        f"{name}: {what}" for name, what in inside.FAULTS.items()
    )
    parser.add_argument(
        "--fault", choices=inside.FAULTS, default=[], action="append", metavar="NAME", help=text
    )
    args = parser.parse_args(words[:end])
    if args.requests < 8 or args.questions < 8 or args.concurrency < 1:
        parser.error("--requests and --questions: 8 or more; --concurrency: 1 or more")
    args.server_args = words[end + 1 :]
    args.command = shlex.join(["python", "scripts/soak.py", *public_words(words, ROOT)])
    return args


def main() -> int:
    """Entry point."""
    args = parse_args()
    # A shell that starts us in the background has SIGINT ignored, and a plain SIGTERM would leave
    # the server running.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
        report = run(args, console)
    except RunError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsoak: interrupted; the server was stopped.", file=sys.stderr)
        return 130
    console.print(table(report))
    if args.out:
        write_json(args.out / "soak.json", as_json(report))
        print(f"Everything is in {args.out / 'soak.json'}.")
    return 1 if report.failures else 0

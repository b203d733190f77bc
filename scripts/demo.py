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
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality.plan import TaskOptions, make_plan
from vllm_kvcompress.evaluation.quality.prompts import Prompter
from vllm_kvcompress.evaluation.tasks.needle import make_samples

sys.path.insert(0, str(Path(__file__).resolve().parent))
import smollm2  # the script beside this one

ROOT = Path(__file__).resolve().parents[1]
PROBE = ROOT / "examples" / "probe-model"
LOG_FILE = ROOT / ".demo" / "server.log"
ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}

START_LIMIT = 300
"""Seconds a server may take to start."""

ANSWER_TOKENS = 24
"""A chat model says a sentence around the number."""

CACHE_MIB = {"probe": 256, "other": 1024}
"""Of KV cache: a token of SmolLM2 takes 45 KiB in float32, one of the probe model 2 KiB."""

MEASURE_TOKENS = (32, 128, 512, 2048)
"""Tokens to decode while blocks are read; more where the server outruns the readings."""

MIN_READINGS = 3
READ_METRICS = ("vllm:kv_c", "vllm:cache_config_info")


class DemoError(Exception):
    """Something a person can read and act on."""


# --- the server's numbers -----------------------------------------------------------------


def parse_metrics(text: str) -> list[Sample]:
    """Samples of a Prometheus text, of the metrics this demo reads: all of them take too long."""
    lines = [line for line in text.splitlines() if any(name in line for name in READ_METRICS)]
    families = text_string_to_metric_families("\n".join(lines) + "\n")
    return [sample for family in families for sample in family.samples]


def total(samples: list[Sample], name: str) -> float:
    """Sum of a metric over all its labels; 0 if it is missing."""
    return sum(s.value for s in samples if s.name == name)


def evicted_per_group(samples: list[Sample]) -> dict[int, int]:
    """Tokens evicted so far in every layer group, summed over policies."""
    counts: dict[int, int] = {}
    for sample in samples:
        if sample.name == "vllm:kv_compression_tokens_evicted_total":
            group = int(sample.labels["layer_group"])
            counts[group] = counts.get(group, 0) + int(sample.value)
    return counts


def kept_per_group(before: list[Sample], after: list[Sample], prompt_tokens: int) -> list[int]:
    """Prompt tokens one request kept in every layer group, from counters around it."""
    old, new = evicted_per_group(before), evicted_per_group(after)
    return [prompt_tokens - (new[group] - old.get(group, 0)) for group in sorted(new)]


def cache_config(samples: list[Sample]) -> dict[str, str]:
    """What the server says about its KV cache."""
    for sample in samples:
        if sample.name == "vllm:cache_config_info":
            return sample.labels
    raise DemoError("The server's /metrics have no vllm:cache_config_info.")


def blocks_held(samples: list[Sample]) -> int:
    """Blocks in use now. vLLM's gauge leaves out the one block that is never handed out."""
    usable = int(cache_config(samples)["num_gpu_blocks"]) - 1
    return round(total(samples, "vllm:kv_cache_usage_perc") * usable)


def block_bytes(samples: list[Sample]) -> float:
    """Size of one block: vLLM divides the memory it was given by the size of a block."""
    config = cache_config(samples)
    return float(config["kv_cache_memory_bytes"]) / int(config["num_gpu_blocks"])


# --- the server ---------------------------------------------------------------------------


def has_nvidia_gpu() -> bool:
    """Whether nvidia-smi works; setup.sh decides the same way which vLLM to install."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi"], capture_output=True, check=False).returncode == 0


def free_port() -> int:
    """A port of 127.0.0.1 nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


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


def last_line(log_file: Path) -> str:
    """The last line of a log that says anything, cut to 100 characters."""
    lines = reversed(log_file.read_text(errors="replace").splitlines())
    return next((line.strip()[:100] for line in lines if line.strip()), "(no output yet)")


def log_tail(log_file: Path, num_lines: int = 30) -> str:
    """The end of a log, for an error message."""
    return "\n".join(log_file.read_text(errors="replace").splitlines()[-num_lines:])


@contextlib.contextmanager
def running_server(command: list[str], log_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a session of its own; stop it and all its children at the end."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
    with log_file.open("wb") as log:
        try:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        except OSError as error:
            raise DemoError(f"The server could not be started: {error}.") from None
    try:
        yield process
    finally:
        if process.poll() is None:
            print("stopping the server", flush=True)
        stop(process)


def stop(process: subprocess.Popen[bytes], patience: float = 20) -> None:
    """Ask the server to end, then insist; a second Ctrl-C insists at once."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if process.poll() is None:
                process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its children, too
        process.wait()


def wait_until_ready(
    process: subprocess.Popen[bytes],
    url: str,
    log_file: Path,
    show: Callable[[float, str], None],
    limit: float = START_LIMIT,
) -> None:
    """Poll /health until it answers; DemoError if the process ends or the time is up."""
    start = time.monotonic()
    while True:
        if process.poll() is not None:
            raise DemoError(f"The server ended with exit code {process.returncode}.")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        elapsed = time.monotonic() - start
        if elapsed > limit:
            raise DemoError(f"The server did not answer within {limit:.0f} s.")
        show(elapsed, last_line(log_file))
        time.sleep(0.5)


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Callable[[float, str], None]]:
    """A line that changes on a terminal; a new line every five seconds elsewhere."""
    if console.is_terminal:
        with console.status("starting") as status:
            yield lambda seconds, line: status.update(f"{seconds:.0f} s  {escape(line)}")
        return
    shown = -5.0

    def show(seconds: float, line: str) -> None:
        nonlocal shown
        if seconds - shown >= 5:
            shown = seconds
            print(f"{seconds:4.0f} s  {line}", flush=True)

    yield show


# --- models and questions -----------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One request.

    Parameters
    ----------
    endpoint : str
        "completions" or "chat".
    prompt : str or list[int]
        Text, or token ids where the answer's beginning follows a chat template.
    answer : str
        The hidden number.
    depth : float
        Where it is hidden, 0 to 1.
    """

    endpoint: str
    prompt: str | list[int]
    answer: str
    depth: float


def endpoint_of(number: int) -> str:
    """Endpoints take turns in pairs: both get every second sample and its neighbour."""
    return ("completions", "chat")[number % 4 in (1, 2)]


def probe_questions(args: argparse.Namespace, tokenize: Callable[[str], Any]) -> list[Question]:
    """What the probe model was trained on; noise and English take turns as the filler."""
    samples = make_samples(args.questions, args.prompt_tokens, tokenize, args.seed)
    return [
        Question(endpoint_of(number), each.prompt, each.answer, each.depth)
        for number, each in enumerate(samples)
    ]


def chat_questions(args: argparse.Namespace) -> list[Question]:
    """Needles of `kvcompress eval`: a chat message, or a completion of the answer's beginning."""
    from transformers import AutoTokenizer

    prompter = Prompter(AutoTokenizer.from_pretrained(args.model))
    options = TaskOptions((args.prompt_tokens,), args.questions, 5, 0, args.seed)
    questions = []
    for number, planned in enumerate(make_plan(["niah"], options, prompter)):
        sample, endpoint = planned.make(), endpoint_of(number)
        chat = sample.context + sample.question
        prompt = chat if endpoint == "chat" else prompter.of(sample).token_ids
        questions.append(Question(endpoint, prompt, sample.answers[0], sample.depth or 0.0))
    return questions


def choose_model(name: str | None, console: Console) -> tuple[str, bool]:
    """Folder of the model, and whether it is the probe model.

    Without a name: SmolLM2, or the probe model where SmolLM2 cannot be had, and says so.
    """
    if name is not None and name not in ("probe", "smollm2"):
        return name, Path(name).resolve() == PROBE.resolve()
    if name != "probe":
        with progress(console) as show:
            start = time.monotonic()
            try:
                return str(smollm2.fetch(say=lambda step: show(_since(start), step))), False
            except smollm2.FetchError as error:
                if name == "smollm2":
                    raise DemoError(str(error)) from None
                print(f"{smollm2.NAME} cannot be had here: {error} The probe model serves.")
    return str(PROBE), True


def _since(start: float) -> float:
    return time.monotonic() - start


# --- requests -----------------------------------------------------------------------------


class Client:
    """Talks to one server; requests go out one at a time, so the metrics around one are its own.

    Parameters
    ----------
    url : str
        The server's address.
    """

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=120)
        self.model: str = self._checked(self.http.get("/v1/models")).json()["data"][0]["id"]

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.is_error:
            path = response.request.url.path
            raise DemoError(f"{path} answered HTTP {response.status_code}: {response.text[:500]}")
        return response

    def tokenize(self, text: str) -> list[int]:
        """Token ids as the server counts them."""
        body = {"model": self.model, "prompt": text}
        return self._checked(self.http.post("/tokenize", json=body)).json()["tokens"]

    def metrics(self) -> list[Sample]:
        """All samples of /metrics."""
        return parse_metrics(self._checked(self.http.get("/metrics")).text)

    def version(self) -> str:
        """Version of vLLM."""
        return self._checked(self.http.get("/version")).json()["version"]

    def body(
        self, endpoint: str, prompt: str | list[int], max_tokens: int, **more: Any
    ) -> dict[str, Any]:
        """JSON of a request."""
        body = {"model": self.model, "temperature": 0, "max_tokens": max_tokens, **more}
        if endpoint == "chat":
            return {**body, "messages": [{"role": "user", "content": prompt}]}
        return {**body, "prompt": prompt}

    def ask(self, endpoint: str, prompt: str | list[int]) -> tuple[str, int]:
        """The model's text, and the prompt's tokens as the server counts them."""
        body = self.body(endpoint, prompt, ANSWER_TOKENS)
        reply = self._checked(self.http.post(ENDPOINTS[endpoint], json=body)).json()
        choice = reply["choices"][0]
        text = choice["message"]["content"] if endpoint == "chat" else choice["text"]
        return text, reply["usage"]["prompt_tokens"]

    def held_per_token(self, body: dict[str, Any], endpoint: str) -> list[int]:
        """Blocks in use on the server at the streamed tokens of a request.

        vLLM sets the gauge after every engine step, so a reading is exact; it may belong to a
        later token than the one just read, and is 0 where the request has ended meanwhile.
        """
        with self.http.stream("POST", ENDPOINTS[endpoint], json=body) as response:
            if response.is_error:
                response.read()
            self._checked(response)
            lines = response.iter_lines()
            readings = [blocks_held(self.metrics()) for line in lines if line.startswith("data: {")]
        return [reading for reading in readings if reading > 0]

    def held(self, endpoint: str, prompt: str | list[int], **more: Any) -> list[int]:
        """Blocks one request holds, read while it decodes; at least `MIN_READINGS` of them."""
        for max_tokens in MEASURE_TOKENS:
            body = self.body(endpoint, prompt, max_tokens, stream=True, ignore_eos=True, **more)
            readings = self.held_per_token(body, endpoint)
            if len(readings) >= MIN_READINGS:
                return readings
        raise DemoError("/metrics could not be read often enough while a request was decoded.")


# --- results ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One question and what it cost.

    Parameters
    ----------
    endpoint : str
        "completions" or "chat".
    prompt_tokens : int
        As the server counts them.
    depth : float
        Where the number is hidden: 0 at the beginning, 1 at the end.
    expected, answer : str
        The hidden number, and the first number in the model's text ("" if there is none).
    kept : list[int]
        Prompt tokens kept in every layer group.
    blocks_freed : int
        Blocks the compaction gave back to the pool.
    held_compressed, held_uncompressed : int
        Blocks held when decoding the same prompt begins, with compression and without.
    """

    endpoint: str
    prompt_tokens: int
    depth: float
    expected: str
    answer: str
    kept: list[int]
    blocks_freed: int
    held_compressed: int
    held_uncompressed: int

    @property
    def right(self) -> bool:
        """Whether the hidden number came back."""
        return self.answer == self.expected

    @property
    def passed(self) -> bool:
        """Right, and really compressed."""
        return self.right and self.blocks_freed > 0


def first_number(text: str) -> str:
    """The first run of digits in a text, "" if there is none."""
    found = re.search(r"\d+", text)
    return found.group() if found else ""


def measure(client: Client, question: Question) -> Row:
    """Ask one question, then decode its prompt twice more to see what it holds."""
    endpoint, prompt = question.endpoint, question.prompt
    before = client.metrics()
    text, prompt_tokens = client.ask(endpoint, prompt)
    after = client.metrics()
    returned = "vllm:kv_compression_blocks_returned_total"
    taken = "vllm:kv_compression_blocks_taken_total"
    freed = total(after, returned) - total(before, returned)
    freed -= total(after, taken) - total(before, taken)
    # The repeats find the prompt in the prefix cache. That saves time, not blocks: cached blocks
    # that a running request uses count as held like any others.
    compressed = client.held(endpoint, prompt)
    uncompressed = client.held(endpoint, prompt, vllm_xargs={"kv_compression": "none"})
    return Row(
        endpoint=endpoint,
        prompt_tokens=prompt_tokens,
        depth=question.depth,
        expected=question.answer,
        answer=first_number(text),
        kept=kept_per_group(before, after, prompt_tokens),
        blocks_freed=round(freed),
        # Decoding only adds blocks, so the least reading is the one nearest to the prompt's end;
        # at the first token a compressed request still has what the next step gives back.
        held_compressed=min(compressed),
        held_uncompressed=min(uncompressed),
    )


def describe_kept(kept: list[int]) -> str:
    """Tokens kept per layer group, short where all groups keep the same."""
    if len(kept) > 1 and len(set(kept)) == 1:
        return f"{len(kept)} x {kept[0]}"
    return " ".join(map(str, kept)) or "-"


def make_table(rows: list[Row]) -> Table:
    """The table for people."""
    table = Table(title="Numbers hidden in long prompts")
    left = ("endpoint", "prompt\ntokens", "depth", "hidden\nnumber", "answer", "")
    right = ("tokens kept per\nlayer group", "blocks\nfreed", "blocks held\nwhile decoding")
    for header in (*left, *right):
        table.add_column(header, justify="left" if header == "endpoint" else "right")
    for row in rows:
        table.add_row(
            row.endpoint,
            str(row.prompt_tokens),
            f"{row.depth:.2f}",
            row.expected,
            row.answer or "none",
            "[green]right[/]" if row.right else "[red]wrong[/]",
            describe_kept(row.kept),
            str(row.blocks_freed),
            f"{row.held_uncompressed} -> {row.held_compressed}",
        )
    return table


def summary(rows: list[Row], bytes_per_block: float) -> list[str]:
    """What the table means, as sentences."""
    mean_mebibytes = bytes_per_block / len(rows) / 2**20
    without = sum(row.held_uncompressed for row in rows) * mean_mebibytes
    compressed = sum(row.held_compressed for row in rows) * mean_mebibytes
    lines = [
        f"{sum(row.right for row in rows)} of {len(rows)} answers are right.",
        f"While decoding, a request held {without:.1f} MiB of KV cache without compression and "
        f"{compressed:.1f} MiB with it (mean).",
        "(Until its prompt ends a request holds all of it; then, for one step, also the copy of "
        "what it keeps.)",
    ]
    idle = [number for number, row in enumerate(rows, 1) if row.blocks_freed <= 0]
    if idle:
        lines.append(f"Compression freed no blocks for: row {', '.join(map(str, idle))}.")
    return lines


def results_json(args: argparse.Namespace, client: Client, rows: list[Row]) -> dict[str, Any]:
    """Everything measured, JSON-ready."""
    return {
        "model": args.model,
        "preset": args.preset,
        "vllm": client.version(),
        "device": "cuda" if has_nvidia_gpu() else "cpu",
        "block_bytes": block_bytes(client.metrics()),
        "rows": [{**asdict(row), "right": row.right} for row in rows],
        "passed": all(row.passed for row in rows),
    }


# --- the demo -----------------------------------------------------------------------------


def ask_all(client: Client, args: argparse.Namespace, is_probe: bool) -> list[Row]:
    """Ask every question, one at a time."""
    print(f"making {args.questions} prompts of about {args.prompt_tokens} tokens", flush=True)
    try:
        questions = probe_questions(args, client.tokenize) if is_probe else chat_questions(args)
    except (ValueError, OSError, ConfigError) as error:
        raise DemoError(f"{str(error).rstrip('.')}.") from None
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
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def shown_log(log_file: Path) -> Iterator[None]:
    """Show the end of the server's log if something goes wrong, before it is told to stop."""
    try:
        yield
    except (DemoError, httpx.HTTPError) as error:
        print(f"--- end of {log_file} ---\n{log_tail(log_file)}\n---", file=sys.stderr)
        if isinstance(error, DemoError):
            raise
        raise DemoError(f"The server stopped answering: {error}.") from None


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


if __name__ == "__main__":
    sys.exit(main())

"""Servers that are started, awaited and stopped with all their children."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import httpx
from rich.console import Console
from rich.markup import escape

from lab.errors import RunError

OURS = "vllm-kvcompress"
START_LIMIT = 300
"""Seconds a server may take to start."""


def has_nvidia_gpu() -> bool:
    """Whether nvidia-smi works; setup.sh decides the same way which vLLM to install."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi"], capture_output=True, check=False).returncode == 0


def stock_plugins() -> str:
    """VLLM_PLUGINS of stock vLLM: without any hook of ours, used or not, and with all others.

    Of ours the one that hands a CPU Triton's interpreter stays: model runner V2 needs it there, and
    on a GPU it does nothing.
    """
    groups = ("general", "platform", "io_processor", "stat_logger")
    plugins = [each for group in groups for each in entry_points(group=f"vllm.{group}_plugins")]
    others = {each.name for each in plugins if each.dist and each.dist.name != OURS}
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None:
        others &= set(allowed.split(","))
    return ",".join(sorted(others | {"kvcompress_cpu_triton"}))


def free_port() -> int:
    """A port of 127.0.0.1 nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def last_line(log_file: Path) -> str:
    """The last line of a log that says anything, cut to 100 characters."""
    lines = reversed(log_file.read_text(errors="replace").splitlines())
    return next((line.strip()[:100] for line in lines if line.strip()), "(no output yet)")


def log_tail(log_file: Path, num_lines: int = 30) -> str:
    """The end of a log, for an error message."""
    return "\n".join(log_file.read_text(errors="replace").splitlines()[-num_lines:])


@contextlib.contextmanager
def running_server(
    command: list[str], log_file: Path, more: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a session of its own; stop it and all its children at the end.

    `more` is what its environment has more than ours.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", **(more or {})}
    with log_file.open("wb") as log:
        try:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        except OSError as error:
            raise RunError(f"The server could not be started: {error}.") from None
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
    """Poll /health until it answers; RunError if the process ends or the time is up."""
    start = time.monotonic()
    while True:
        if process.poll() is not None:
            raise RunError(f"The server ended with exit code {process.returncode}.")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        elapsed = time.monotonic() - start
        if elapsed > limit:
            raise RunError(f"The server did not answer within {limit:.0f} s.")
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

"""``vllm serve`` in a process of its own."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.forked import FORKED

VLLM = Path(sys.executable).parent / "vllm"


@dataclass
class Server:
    """A running server."""

    url: str
    log: Path

    def complete(self, prompt, **fields) -> httpx.Response:
        body = {"model": "probe", "prompt": prompt, "max_tokens": 10, "temperature": 0, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that carry the labels; 0 where there are none."""
        total = 0.0
        for line in httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            found = re.match(rf"{name}(\{{(.*)\}})? (\S+)$", line)
            if found and all(f'{key}="{value}"' in line for key, value in labels.items()):
                total += float(found[3])
        return total


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """The tests' environment without what keeps engines in this process."""
    drop = {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"}
    return {key: value for key, value in os.environ.items() if key not in drop}


@contextmanager
def serving(model: str, log: Path, *options: str, as_a_user: bool = False) -> Iterator[Server]:
    """Serve a model under the name "probe" until the block ends.

    Forks vLLM's processes, unless it is to be started as a user does it: see `tests.forked`.
    """
    port = free_port()
    program = [str(VLLM)] if as_a_user else [sys.executable, str(FORKED)]
    command = [
        *[*program, "serve", model, "--served-model-name", "probe", "--host", "127.0.0.1"],
        *["--port", str(port), *options],
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment()
        )
    running = Server(f"http://127.0.0.1:{port}", log)
    try:
        wait_until_healthy(process, running)
        yield running
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_until_healthy(process: subprocess.Popen, server: Server, limit: float = 480) -> None:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        assert process.poll() is None, server.log.read_text()[-4000:]
        try:
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    pytest.fail(f"not healthy after {limit} s: {server.log.read_text()[-4000:]}")

"""Faults of one of two tensor-parallel ranks, in a server on this machine: see docs/trust.md.

Starts `vllm serve` twice over the probe model, with a policy that fails where the prompt's length
says so, and a worker that is stopped for a while, leaves, or is killed. Prints what was found.

    python scripts/rank_faults.py
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from lab.places import leave_entry_point
from lab.random_models import distinct_tokens
from lab.servers import free_port, log_tail, running_server, wait_until_ready
from vllm_kvcompress.registry import POLICY_GROUP

ROOT = Path(__file__).parents[2]

POLICY = '''
"""Key differences, but for prompts of some lengths."""

from vllm_kvcompress.policies.keydiff import KeyDiff


class Faulty(KeyDiff):
    """Fails where the prompt's length says so."""

    def score(self, inputs):
        scores, length = super().score(inputs), inputs.rows.num_tokens
        is_second_rank = inputs.first_kv_head == 1
        if length == 250 or (length == 450 and is_second_rank):
            raise ValueError("a policy's own bug")
        if length == 350 and is_second_rank:
            scores[:, 100] = float("nan")
        return scores
'''
SETTING = (
    '{"policy": {"name": "faulty"}, "budget": {"ratio": 0.25, "floor": 1}, "min_prompt_len": 64}'
)
STOPPED_FOR = 5


def install(folder: Path) -> None:
    """What pip leaves of a package that registers the policy."""
    (folder / "faulty.py").write_text(POLICY)
    leave_entry_point(folder, "faulty", POLICY_GROUP, "faulty:Faulty")


def processes(session: int) -> dict[int, str]:
    """Living processes of a session, with their names."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            name = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found[int(entry.name)] = name
    return found


class Server:
    """One that runs."""

    def __init__(self, process: Any, url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log

    def ask(self, length: int, num_tokens: int = 24, **xargs: Any) -> str:
        """Greedy answer to a prompt of so many tokens."""
        asked = {
            "model": "probe",
            "prompt": distinct_tokens(length, length),
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "vllm_xargs": xargs,
        }
        answer = httpx.post(f"{self.url}/v1/completions", json=asked, timeout=300)
        answer.raise_for_status()
        return answer.json()["choices"][0]["text"]

    def count(self, name: str) -> float:
        """A counter's value, with its labels as they are printed."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if name in line and line[0] != "#")

    def second_worker(self) -> int:
        """Process of rank 1."""
        named = processes(self.process.pid).items()
        (found,) = [pid for pid, name in named if "Worker" in name and "TP1" in name]
        return found

    def awaits_end(self, sentence: str) -> dict[str, Any]:
        """It ends by itself: how, and what is left of it."""
        start = time.monotonic()
        code = self.process.wait(180)
        time.sleep(3)
        return {
            "exit code": code,
            "seconds until it ended": round(time.monotonic() - start - 3, 1),
            "processes left": processes(self.process.pid),
            "the log says so": sentence in self.log.read_text(errors="replace"),
        }


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    port, log = free_port(), folder / "server.log"
    url = f"http://127.0.0.1:{port}"
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve",
        str(ROOT / "examples" / "probe-model"), "--served-model-name", "probe",
        "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024",
        "--tensor-parallel-size", "2", "--kv-cache-memory-bytes", str(64 << 20),
        "--max-num-seqs", "4", "--kv-compression", "keydiff", "--kv-compression-config", SETTING,
    ]  # fmt: skip
    with running_server(command, log) as process:
        try:
            wait_until_ready(process, url, log, lambda seconds, line: None, limit=900)
            yield Server(process, url, log)
        except BaseException:
            print(log_tail(log, 60))
            raise


def check(what: str, is_so: bool, more: Any = "") -> None:
    print(f"{'ok  ' if is_so else 'FAIL'} {what} {more}", flush=True)
    if not is_so:
        raise SystemExit(1)


def in_one_server(server: Server) -> None:
    """Faults that it survives, and one that it does not."""
    whole = {length: server.ask(length, kv_compression="none") for length in (150, 250, 350)}
    first = server.ask(150)
    check("compression shows in the answer", first != whole[150])
    check("raised on both ranks: the answer without compression", server.ask(250) == whole[250])
    check("NaN on one rank: the answer without compression", server.ask(350) == whole[350])
    for reason in ("error", "nan_scores"):
        name = f'kv_compression_failures_total{{engine="0",model_name="probe",reason="{reason}"'
        check(f"counted as {reason}", server.count(name) == 1)
    worker = server.second_worker()
    os.kill(worker, signal.SIGSTOP)
    start = time.monotonic()
    if os.fork() == 0:
        time.sleep(STOPPED_FOR)
        os.kill(worker, signal.SIGCONT)
        os._exit(0)
    answer = server.ask(150)
    seconds = time.monotonic() - start
    os.wait()
    check("a rank that stands still: the same answer", answer == first, f"after {seconds:.0f} s")
    try:
        server.ask(450)
        check("raised on one rank alone: an error", False)
    except httpx.HTTPError as error:
        check("raised on one rank alone: an error", True, type(error).__name__)
    found = server.awaits_end("failed on rank 1 alone")
    is_clean = not found["processes left"] and found["the log says so"]
    check("and the server ends", is_clean, found)


def killed(server: Server) -> None:
    server.ask(150)
    os.kill(server.second_worker(), signal.SIGKILL)
    found = server.awaits_end("died unexpectedly")
    check("a worker is killed: the server ends", not found["processes left"], found)


def main() -> None:
    """Both runs."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
    for run in (in_one_server, killed):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            install(folder)
            known = os.environ.get("PYTHONPATH", "")
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [name, known]))
            with served(folder) as server:
                run(server)
            os.environ["PYTHONPATH"] = known

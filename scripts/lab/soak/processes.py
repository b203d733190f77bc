"""A server's processes: what each holds, and what is left when it is gone."""

import contextlib
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

SHARED_MEMORY = "/dev/shm/"


@dataclass(frozen=True)
class Reading:
    """What one process holds.

    Attributes
    ----------
    pid : int
        Its id.
    name : str
        As vLLM calls it.
    rss_mib : float
        Resident memory in MiB.
    num_files, num_threads : int
        Open file descriptors, and threads.
    """

    pid: int
    name: str
    rss_mib: float
    num_files: int
    num_threads: int

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self)


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it that are alive."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def read(pid: int) -> list[Reading]:
    """A reading of each process of a server."""
    readings = []
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied), process.oneshot():
            readings.append(
                Reading(
                    process.pid,
                    _name(process),
                    process.memory_info().rss / 2**20,
                    process.num_fds(),
                    process.num_threads(),
                )  # fmt: skip
            )
    return readings


def _name(process: psutil.Process) -> str:
    """vLLM names its processes in their command lines."""
    words = process.cmdline() or [process.name()]
    for word in words:
        if word.startswith("VLLM::"):
            return word
    if any("resource_tracker" in word for word in words):
        return "resource tracker"
    is_server = any(word == "serve" for word in words)
    return (
        "API server" if is_server else " ".join(Path(words[0]).name.split()[:1] + words[1:3])[:60]
    )


def shared_memory(processes: Iterable[psutil.Process]) -> set[str]:
    """Files in /dev/shm that these processes have mapped or open."""
    found: set[str] = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            found |= {each.path for each in process.memory_maps()}
            found |= {each.path for each in process.open_files()}
    return {path.split(" ")[0] for path in found if path.startswith(SHARED_MEMORY)}


class Watch:
    """Remembers every process and every shared file of a server while it runs.

    Parameters
    ----------
    pid : int
        The server's process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.processes: dict[int, psutil.Process] = {}
        self.files: set[str] = set()
        self.names: dict[int, str] = {}

    def look(self) -> None:
        """Take in what is there now."""
        for process in tree(self.pid):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                self.names.setdefault(process.pid, _name(process))
                self.processes.setdefault(process.pid, process)
        self.files |= shared_memory(tree(self.pid))

    def orphans(self, patience: float = 2.0) -> list[psutil.Process]:
        """Those that are still alive; a process that its parent has not waited for yet is not."""
        end = time.monotonic() + patience
        while True:
            alive = [each for each in self.processes.values() if _is_alive(each)]
            if not alive or time.monotonic() > end:
                return alive
            time.sleep(0.1)

    def files_left(self) -> list[str]:
        """Shared files that are still there."""
        return sorted(path for path in self.files if Path(path).exists())


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False

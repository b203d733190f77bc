"""Runs stages one after the other, each a process with a time limit, and writes results at once.

A stage that fails, hangs or cannot be started never hides the next one.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from lab.places import importable

PASSED, FAILED, TIMED_OUT, SKIPPED = "passed", "failed", "timed out", "not run"
GRACE = 30.0
"""Seconds between asking a stage to end and killing it: servers have to be stopped."""

LEAST = 30.0
"""Seconds that must be left of the whole time for a stage to be begun."""


@dataclass(frozen=True)
class Stage:
    """One check or measurement.

    Attributes
    ----------
    name : str
        What ``--stages`` takes, and the name of its files.
    title : str
        For the table.
    command : Sequence[str]
        Program and arguments; ``{out}`` is the stage's own folder, which exists.
    shown : str
        The command as it is written into results: without this machine's paths.
    limit : float
        Seconds.
    summary : callable
        One line from the stage's folder, read even where it failed; raises OSError, KeyError or
        ValueError where there is nothing to read.
    environment : Mapping[str, str]
        What it has more than ours.
    """

    name: str
    title: str
    command: Sequence[str]
    shown: str
    limit: float
    summary: Callable[[Path], str] = lambda folder: ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of a stage; written as JSON the moment it ends."""

    stage: str
    title: str
    status: str
    seconds: float
    limit: float
    summary: str
    command: str
    started: str
    about: dict[str, Any]


def run_stages(
    stages: Iterable[Stage],
    out: Path,
    about: dict[str, Any],
    total: float = float("inf"),
    resume: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """Run stages in order.

    Parameters
    ----------
    stages : iterable of Stage
        In order of worth: where time runs out, the last ones are not run.
    out : pathlib.Path
        Folder of the results; it must exist. Each stage gets ``NAME/`` with its files and its
        output in ``log.txt``, and ``NAME.json``.
    about : dict
        Where the numbers come from; goes into every result.
    total : float
        Seconds for all stages.
    resume : bool
        Keep results of stages that passed before.
    tell : callable
        Gets a line before and after each stage.
    """
    end = time.monotonic() + total
    outcomes = []
    for stage in stages:
        before = _passed_before(out, stage) if resume else None
        if before is not None:
            tell(f"{stage.name}: passed before")
            outcomes.append(before)
            continue
        left = end - time.monotonic()
        limit = min(stage.limit, left)
        tell(f"{stage.name}: {stage.title} (at most {limit:.0f} s)")
        outcome = _skipped(stage, about) if left < LEAST else _run(stage, out, about, limit)
        write_json(out / f"{stage.name}.json", asdict(outcome))
        tell(f"{stage.name}: {outcome.status} after {outcome.seconds:.0f} s. {outcome.summary}")
        outcomes.append(outcome)
    return outcomes


def write_json(path: Path, found: Any) -> None:
    """Write a whole file or none: a run may be cut off at any moment."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _set_aside(out: Path, name: str) -> None:
    """Keep what an earlier try of a stage has left, as ``NAME.1``, ``NAME.2``, ..."""
    folder, result = out / name, out / f"{name}.json"
    if not folder.exists():
        return
    number = next(n for n in count(1) if not (out / f"{name}.{n}").exists())
    if result.exists():
        result.rename(folder / "outcome.json")
    folder.rename(out / f"{name}.{number}")


def _passed_before(out: Path, stage: Stage) -> Outcome | None:
    try:
        found = Outcome(**json.loads((out / f"{stage.name}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.status == PASSED else None


def _skipped(stage: Stage, about: dict[str, Any]) -> Outcome:
    words = "the time for all stages is over"
    return Outcome(stage.name, stage.title, SKIPPED, 0, stage.limit, words, stage.shown, "", about)


def _run(stage: Stage, out: Path, about: dict[str, Any], limit: float) -> Outcome:
    folder = out / stage.name
    _set_aside(out, stage.name)
    folder.mkdir()
    command = [word.replace("{out}", str(folder)) for word in stage.command]
    started, begin = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    status, words = run_limited(command, folder / "log.txt", limit, stage.environment)
    seconds = time.monotonic() - begin
    try:
        found = stage.summary(folder)
    except (OSError, KeyError, ValueError):
        found = ""
    last = "" if status == PASSED else _last_line(folder / "log.txt")
    summary = ". ".join(filter(None, [words, found, last]))
    return Outcome(
        stage.name, stage.title, status, seconds, limit, summary, stage.shown, started, about
    )


def run_limited(
    command: Sequence[str], log: Path, limit: float, environment: Mapping[str, str]
) -> tuple[str, str]:
    """Run a program in a session of its own; at its limit end it and all that it has started.

    Parameters
    ----------
    command : sequence of str
        Program and arguments.
    log : pathlib.Path
        Gets what it prints.
    limit : float
        Seconds.
    environment : mapping
        What it has more than ours.

    Returns
    -------
    tuple of str
        `PASSED`, `FAILED` or `TIMED_OUT`, and why.
    """
    with log.open("wb") as stream:
        try:
            process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **importable(), **environment},
                start_new_session=True,
            )
        except OSError as error:
            return FAILED, f"could not be started: {error.strerror}"
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            _stop(process)
            return TIMED_OUT, f"stopped after {limit:.0f} s"
        except BaseException:
            _stop(process)  # Ctrl-C: leave nothing behind
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what a program that died has left
    return (PASSED, "") if code == 0 else (FAILED, f"exit code {code}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a stage and everything it has started, whatever sessions these are in."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
    except psutil.NoSuchProcess:
        family = []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue


def _last_line(log: Path) -> str:
    """The last line of a log that says something, cut short."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:300] if said else ""

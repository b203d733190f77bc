"""Shows a soak while it runs, and what came of it."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lab.soak.findings import Report
from lab.soak.run import Show

MOST_SHOWN = 12
"""Failures in the table; the JSON has all."""


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Show]:
    """A bar with the time left on a terminal; elsewhere a line every fifteen seconds."""
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, count: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=count)
            bar.update(tasks[what], completed=done)

        yield show


class _Lines:
    """Lines for a log."""

    def __init__(self) -> None:
        self.what, self.start, self.next = "", 0.0, 0.0

    def __call__(self, what: str, done: int, count: int) -> None:
        if what != self.what:
            self.what, self.start, self.next = what, time.monotonic(), 0.0
        elapsed = time.monotonic() - self.start
        if elapsed < self.next and done < count:
            return
        self.next = elapsed + 15
        left = f", about {elapsed / done * (count - done):.0f} s left" if done else ""
        print(f"{what}: {done:,} of {count:,} after {elapsed:.0f} s{left}", flush=True)


def table(report: Report) -> Table:
    """What came of it."""
    found = Table(title="Soak", show_header=False, title_justify="left")
    for name, text in rows(report):
        found.add_row(name, escape(text))
    for failure in report.failures[:MOST_SHOWN]:
        found.add_row(f"[red]{failure['what']}", escape(f"{failure['detail']}"[:400]))
    if len(report.failures) > MOST_SHOWN:
        found.add_row("[red]more", f"{len(report.failures) - MOST_SHOWN} more failures")
    return found


def rows(report: Report) -> list[tuple[str, str]]:
    """Lines of the table: what, and how much."""
    counted = report.counted
    lines = [
        (
            "requests",
            f"{sum(report.fates.values()):,} of {report.asked:,}: {_listed(report.fates)}",
        ),
        ("came to", _listed(report.outcomes)),
        ("questions", f"{sum(report.questions.values())}: {_listed(report.questions)}; "
         f"{report.distinct_answers} with an answer of their own"),
        ("equal to the same alone", f"{report.answers_compared:,} answers, "
         f"{report.tokens_compared:,} tokens; {_count(report, 'answer')} not"),
        ("second turns", _listed(report.second_turns)),
        ("lossless, equal to stock", f"{report.equal_to_stock} of {report.lossless_compared}"),
        ("lossy, changed", f"{report.changed_by_compression} of {report.lossy_compared}"),
        ("server", _listed(counted)),
        ("compressed by", _listed(report.policies)),
        ("prefix cache emptied", f"{report.resets} times under load"),
        *_memory(report),
        ("left after a reset", _listed(report.kept_left) or "?"),
        ("containers that grew", _listed(report.containers) or "none"),
        ("SIGTERM", _listed(report.ending)),
        ("seconds", _listed({name: round(each) for name, each in report.seconds.items()})),
        ("failures", _listed(Counter(each["what"] for each in report.failures)) or "none"),
    ]  # fmt: skip
    return [(name, text) for name, text in lines if text]


def _memory(report: Report) -> Iterator[tuple[str, str]]:
    """Each process at a quarter of the requests and at the end."""
    if not report.memory:
        return
    count = report.memory[-1]["requests"]
    quarter = next((each for each in report.memory if each["requests"] >= count / 4), None)
    if quarter is None:
        return
    last = {each["pid"]: each for each in report.memory[-1]["processes"]}
    for before in quarter["processes"]:
        after = last.get(before["pid"])
        if after is not None:
            yield (
                f"{before['name']}",
                f"{before['rss_mib']:.0f} MiB at {quarter['requests']:,} requests, "
                f"{after['rss_mib']:.0f} at the end; open files {before['num_files']}, "
                f"{after['num_files']}; threads {before['num_threads']}, {after['num_threads']}",
            )


def _count(report: Report, what: str) -> int:
    return sum(each["what"] == what for each in report.failures)


def _listed(counts: Any) -> str:
    return ", ".join(f"{name} {_number(each)}" for name, each in counts.items())


def _number(value: Any) -> str:
    return f"{value:,g}" if isinstance(value, int | float) and value < 1e6 else f"{value}"


def as_json(report: Report) -> dict[str, Any]:
    """Everything, for soak.json."""
    found = asdict(report)
    found["passed"] = not report.failures
    return found

"""The table at the end, and the page that is written of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.gpu_check.runner import Outcome

REHEARSAL = "rehearsal on CPU, not a GPU result"


def kind_of(about: dict[str, Any]) -> str:
    """What the numbers are, in words."""
    return REHEARSAL if about["rehearsal"] else f"measured on {about['device']}"


def table(outcomes: Sequence[Outcome], about: dict[str, Any]) -> str:
    """Plain text: what ran, for how long, and one line of each."""
    rows = [(o.stage, o.status, f"{o.seconds:.0f} s", o.summary) for o in outcomes]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{kind_of(about)}; commit {about['commit']}"]
    for name, status, seconds, summary in rows:
        lines.append(
            f"{name:{widths[0]}}  {status:{widths[1]}}  {seconds:>{widths[2]}}  {summary}".rstrip()
        )
    return "\n".join(lines)


def write_page(
    outcomes: Sequence[Outcome], about: dict[str, Any], path: Path, command: str
) -> None:
    """README.md of the results' folder."""
    lines = [
        "# The first hour on a GPU",
        "",
        f"**{kind_of(about)}.** Written by `{command}`; commit {about['commit']}; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + ".",
        "",
        "| stage | status | time | result |",
        "|---|---|---|---|",
    ]
    for each in outcomes:
        summary = each.summary.replace("|", "/")
        lines.append(
            f"| {each.stage}: {each.title} | {each.status} | {each.seconds:.0f} s | {summary} |"
        )
    lines += [
        "",
        "Each stage has its output in `STAGE/log.txt` and its command in `STAGE.json`.",
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")

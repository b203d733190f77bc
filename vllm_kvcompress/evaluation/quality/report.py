"""The report of ``kvcompress eval``: report.html and cells.csv, written from a run's folder."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality import section_tables, sections
from vllm_kvcompress.evaluation.quality.cells import write_csv
from vllm_kvcompress.evaluation.quality.page import Section, document, paragraph
from vllm_kvcompress.evaluation.quality.records import FAILURES, RUN, read_records
from vllm_kvcompress.evaluation.quality.text import escape
from vllm_kvcompress.evaluation.quality.view import Run
from vllm_kvcompress.evaluation.whole_files import write_whole

REPORT, CELLS = "report.html", "cells.csv"
TITLE = "Answers under a compressed KV cache"

SECTIONS: tuple[tuple[str, str, Callable[[Run], str]], ...] = (
    ("asked", "What was asked", sections.asked),
    ("headline", "Scores over all tasks", sections.headline),
    ("accuracy", "Accuracy against bytes kept", sections.accuracy),
    ("needles", "Needles by depth and length", sections.needles),
    ("continuation", "Predicted texts", section_tables.continuation),
    ("tasks", "Task by task", section_tables.per_task),
    ("lengths", "Length of answers", section_tables.drift),
    ("flips", "Answers that changed sides", section_tables.flipped),
    ("failures", "Failures", section_tables.failures),
    ("how", "How it was measured", section_tables.how),
)
"""Anchor, heading and maker; a part that has nothing to show is left out."""


def read_run(folder: Path) -> Run:
    """What `records.RecordFolder` wrote.

    Raises
    ------
    ConfigError
        If the folder holds no run.
    """
    path = folder / RUN
    if not path.is_file():
        raise ConfigError(f"{folder} holds no run of kvcompress eval: there is no {RUN}.")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}.") from None
    if not isinstance(about, dict):
        raise ConfigError(f"{path}: no run of kvcompress eval.")
    return Run(
        asked=_mapping(about.get("asked")),
        measured_with=_mapping(about.get("measured_with")),
        records=list(read_records(folder)),
        failures=_read_failures(folder / FAILURES),
    )


def write_report(folder: Path) -> Path:
    """Write report.html and cells.csv into a run's folder, over older ones.

    Parameters
    ----------
    folder : Path
        With run.json and, once something is measured, records.jsonl.

    Returns
    -------
    Path
        Of report.html.
    """
    run = read_run(folder)
    write_csv(run.records, folder / CELLS, run.measured_with)
    path = folder / REPORT
    # A reader that reloads during a run never finds half a page.
    write_whole(path, make_page(run))
    return path


def make_page(run: Run) -> str:
    """The report as HTML."""
    model = str(run.asked.get("model") or run.measured_with.get("model") or "unnamed model")
    made = [Section(ident, title, make(run)) for ident, title, make in SECTIONS]
    head = f"<h1>{escape(TITLE)}</h1>{paragraph(model, 'model')}"
    shown = [each for each in made if each.body]
    return document(f"{TITLE}: {model}", head, shown, len(run.policies))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_failures(path: Path) -> list[Mapping[str, Any]]:
    """Lines of failures.jsonl, the last of each sample: every run of the command adds its own. A
    line that a crash cut off is left out."""
    found: list[Mapping[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                found.append(_mapping(json.loads(line)))
            except (ValueError, RecursionError):
                continue
    latest = {(str(each.get("task")), str(each.get("sample"))): each for each in found if each}
    return list(latest.values())

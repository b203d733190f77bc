"""Reads the texts of `texts/`, from which prompts are made.

A file of sections has a line about itself, then ``# name`` above each section. Braces are filled by
`contexts.TextSource.fill`. Of every pool two thirds are for training and every third entry is held
out, so that no word, sentence or question frame is in both; what only training styles use
(`instruction_words`, `whole_questions`) is for training alone: the held-out styles are written out
in full. What both classes use alike (its first four sections) says nothing, so that the verbs and
their objects must.
"""

import re
from pathlib import Path

_FOLDER = Path(__file__).with_name("texts")
_HEAD = re.compile(r"^# ([\w-]+)\n", re.MULTILINE)
_SEPARATOR = "\n----\n"


def sections(name: str) -> dict[str, str]:
    """Bodies of a file's sections, in its order, each with a line feed at its end.

    A backslash at the end of a line joins it to the next one.
    """
    _, *pieces = _HEAD.split(_read(name).replace("\\\n", ""))
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


def pools(name: str) -> dict[str, tuple[str, ...]]:
    """A file of sections that have an entry per line."""
    return {kind: _entries(body) for kind, body in sections(name).items()}


def lines(name: str) -> tuple[str, ...]:
    """A file that has an entry per line."""
    return _entries(_read(name))


def blocks(name: str) -> tuple[str, ...]:
    """A file whose entries have several lines and stand between lines of four dashes."""
    return tuple(_read(name).removesuffix("\n").split(_SEPARATOR))


def _entries(text: str) -> tuple[str, ...]:
    """A bar at the end of a line keeps the blank before it."""
    return tuple(line.removesuffix("|") for line in text.removesuffix("\n").split("\n"))


def _read(name: str) -> str:
    return (_FOLDER / f"{name}.txt").read_text(encoding="utf-8")

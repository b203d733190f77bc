"""Sees every file that is opened and everything that is run, through Python's audit events."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WATCHED = (
    "open",
    "exec",
    "compile",
    "import",
    "marshal.",
    "pickle.",
    "ctypes.dlopen",
    "os.",
    "pathlib.",
    "shutil.",
    "glob.",
    "tempfile.",
    "subprocess.",
    "socket.",
    "urllib.",
)
"""How the names of events begin that are seen. What an object is asked for is not among them."""

_lists: list[list[tuple[str, tuple[Any, ...]]]] = []
_is_installed = False


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _lists and event.startswith(WATCHED):
        for each in _lists:
            each.append((event, args))


@contextmanager
def watched() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Events of this process until the block ends, with their arguments.

    An audit hook cannot be taken away again; there is one, which does nothing outside such blocks.
    """
    global _is_installed
    if not _is_installed:
        sys.addaudithook(_hook)
        _is_installed = True
    events: list[tuple[str, tuple[Any, ...]]] = []
    _lists.append(events)
    try:
        yield events
    finally:
        _lists.pop(next(i for i, each in enumerate(_lists) if each is events))

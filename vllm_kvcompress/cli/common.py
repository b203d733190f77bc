"""What the commands of `kvcompress` share: printing, and types of options."""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 120  # of tables that go to a file or another program


def make_console(stderr: bool = False) -> Console:
    """A console that adds no colours of its own."""
    console = Console(stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


def say(text: str) -> None:
    """Print lines as they are: no wrapping, no markup."""
    make_console().print(text, soft_wrap=True)


def complain(kind: str, text: str) -> None:
    """Print an error or a warning where they belong."""
    make_console(stderr=True).print(f"kvcompress: {kind}: {text}", soft_wrap=True)


def make_table(*columns: str, folds: Sequence[int] = (), right: Sequence[int] = ()) -> Table:
    """An empty table; cells of the columns in `folds` may take several lines."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, title in enumerate(columns):
        side: Literal["left", "right"] = "right" if index in right else "left"
        table.add_column(title, justify=side, no_wrap=index not in folds, overflow="fold")
    return table


def show(table: Table, least: int | None = None) -> None:
    """Print a table, wider than the terminal rather than with cells cut off."""
    console = make_console()
    if least is None:
        least = table.__rich_measure__(console, console.options.update(max_width=10_000)).maximum
    console.width = max(console.width, least)
    console.print(table)


def at_least(smallest: int) -> Callable[[str], int]:
    """Type of an option that takes a whole number."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"must be {smallest} or more, got {value}")
        return value

    return whole_number


def share(text: str) -> float:
    """Type of an option that takes a number in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value

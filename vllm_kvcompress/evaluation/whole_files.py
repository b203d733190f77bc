"""Files that are there as a whole or not at all: a full disk, or Ctrl-C, leaves no half report."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what is to be found at `path`: a file or a folder beside it.

    It takes the place of what is there once the block ends and all is on the disk; if the block
    raises it goes, and what is there stays.
    """
    part = path.with_name(path.name + ".part")
    try:
        yield part
        if part.is_file():
            with part.open("rb") as file:
                os.fsync(file.fileno())  # a disk may be found full only now
        part.replace(path)
    except BaseException:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file, over what is there."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")

"""Random requests, aborts and cache resets in a pool that is too small; books checked every step.

``scripts/lab/random_load.py`` does the same for as long as one likes.
"""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

pytestmark = pytest.mark.engine

STEPS = 30
"""Steps of load; the engine then runs until all requests are answered."""
MAX_OUTPUT = 24


@pytest.fixture(scope="module")
def script(root) -> Iterator[ModuleType]:
    folder = str(root / "scripts" / "lab")
    sys.path.insert(0, folder)  # it imports the modules beside it
    try:
        yield importlib.import_module("random_load")
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize("mode", ["draft-copied", "draft-linked", "ngram", "interval", "codebook"])
def test_random_load_leaves_nothing_behind(script: ModuleType, mode: str) -> None:
    load = script.Load(mode, seed=1, max_output=MAX_OUTPUT)
    with script.opened(load) as engine:
        report = script.Run(engine, load).run(STEPS, None)
    assert not report.failures, "\n".join([*report.failures, *report.requests, report.command])
    assert report.blocks_missing == 0
    assert report.finished > 3 and report.aborted > 0
    assert report.views > 0 if mode.startswith("draft") else report.compactions > 0

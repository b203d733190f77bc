"""Random requests, aborts and cache resets in a pool that is too small; books checked every step.

``scripts/lab/random_load.py`` does the same for as long as one likes.
"""

import pytest

from lab import random_load

pytestmark = pytest.mark.engine

STEPS = 30
"""Steps of load; the engine then runs until all requests are answered."""
MAX_OUTPUT = 24
MODES = ("draft-copied", "draft-linked", "ngram", "interval", "prompt", "codebook")


@pytest.mark.parametrize("mode", MODES)
def test_random_load_leaves_nothing_behind(mode: str) -> None:
    load = random_load.Load(mode, seed=1, max_output=MAX_OUTPUT)
    with random_load.opened(load) as engine:
        report = random_load.Run(engine, load).run(STEPS, None)
    assert not report.failures, "\n".join([*report.failures, *report.requests, report.command])
    assert report.blocks_missing == 0
    assert report.finished > 3 and report.aborted > 0
    assert report.views > 0 if mode.startswith("draft") else report.compactions > 0

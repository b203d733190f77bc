"""Random requests, aborts and cache resets in a pool that is too small; books checked every step,
and in all modes but codebooks every row that attention reads (lab/row_marks.py).

``scripts/lab/random_load.py`` does the same for as long as one likes.
"""

from typing import Any

import pytest
import torch

from lab import random_load
from lab.load_checks import LoadError
from tests.e2e.marked import BLOCK, ask
from vllm_kvcompress.evaluation.engine import Engine

pytestmark = pytest.mark.engine

STEPS = 30
"""Steps of load; the engine then runs until all requests are answered."""
MAX_OUTPUT = 24
MODES = ("draft-copied", "draft-linked", "shared-draft", "ngram", "interval", "prompt", "codebook")
DRAFT_STEPS = ("draft-copied", "draft-linked", "shared-draft")


@pytest.mark.parametrize("mode", MODES)
def test_random_load_leaves_nothing_behind(mode: str) -> None:
    load = random_load.Load(mode, seed=1, max_output=MAX_OUTPUT, marks=mode != "codebook")
    with random_load.opened(load) as engine:
        run = random_load.Run(engine, load)
        report = run.run(STEPS, None)
        assert not report.failures, "\n".join([*report.failures, *report.requests, report.command])
        if mode == "shared-draft":  # of the random ones, hardly any drafts
            ask(run, engine, "a view beside an eviction")
        elif mode in DRAFT_STEPS:
            drafts_that_read_others_rows_are_found(engine, run)
    assert report.blocks_missing == 0
    assert report.finished > 3 and report.aborted > 0
    assert report.views > 0 if mode in DRAFT_STEPS else report.compactions > 0
    if run.marks is not None:
        assert report.rows_read > 100_000
        assert (run.marks.num_drafted > 1000) == (mode in DRAFT_STEPS)
        assert (run.marks.num_verified > 0) == (mode in (*DRAFT_STEPS, "ngram"))


def drafts_that_read_others_rows_are_found(engine: Engine, run: random_load.Run) -> None:
    """A view's first blocks change places, its tail begins late, drafts are written elsewhere."""
    step = engine.runner.speculator.step
    views = step.state.views
    table, dropped, slots = views.table, views.num_dropped, step._physical_slots

    def changed(group: int, rows: torch.Tensor) -> torch.Tensor:
        found = table(group, rows)
        found[:, :2] = found[:, :2].flip(1)
        return found

    def late(group: int, rows: torch.Tensor) -> torch.Tensor:
        return dropped(group, rows) + BLOCK

    def before(positions: torch.Tensor, **more: Any) -> None:
        slots(positions=positions - 1, **more)

    faults = [
        (views, "table", changed, "draft step 0, head 0, row 0: token"),
        (views, "num_dropped", late, "rows are read instead of"),
        (step, "_physical_slots", before, "a draft not token"),
    ]
    ask(run, engine, "without a fault")
    for owner, name, spoilt, said in faults:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(LoadError, match=said):
            patch.setattr(owner, name, spoilt)
            ask(run, engine, name)

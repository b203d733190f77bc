"""Random requests, aborts and cache resets in a pool that is too small; books checked every step,
and in all modes but codebooks every row that attention reads (lab/row_marks.py).

``scripts/lab/random_load.py`` does the same for as long as one likes.
"""

from copy import copy
from typing import Any

import pytest
import torch

from lab import random_load
from lab.load_checks import LoadError
from tests.e2e.marked import BLOCK, ask
from tests.inside import managers
from vllm_kvcompress.core import scheduler
from vllm_kvcompress.evaluation.engine import Engine

pytestmark = pytest.mark.engine

STEPS = 30
"""Steps of load; the engine then runs until all requests are answered."""
MAX_OUTPUT = 24
MODES = {
    "draft-copied": True, "draft-linked": True, "shared-draft": False, "ngram": True,
    "draft-model": True, "prompt": False, "codebook": False,
}  # fmt: skip
"""And whether steps are scheduled ahead: before it is known which drafts have been accepted."""
DRAFT_STEPS = ("draft-copied", "draft-linked", "shared-draft")
VERIFIED = (*DRAFT_STEPS, "ngram", "draft-model")


@pytest.mark.parametrize("mode", MODES)
def test_random_load_leaves_nothing_behind(mode: str) -> None:
    load = random_load.Load(
        mode, seed=1, max_output=MAX_OUTPUT, marks=mode != "codebook", async_scheduling=MODES[mode]
    )
    with random_load.opened(load) as engine:
        assert (engine.core.batch_queue is not None) == MODES[mode]
        run = random_load.Run(engine, load)
        report = run.run(STEPS, None)
        assert not report.failures, "\n".join([*report.failures, *report.requests, report.command])
        if mode == "shared-draft":  # of the random ones, hardly any drafts
            ask(run, engine, "a view beside an eviction")
        elif mode in DRAFT_STEPS:
            drafts_that_read_others_rows_are_found(engine, run)
        elif mode == "ngram":
            drafts_that_stay_though_rejected_are_found(engine, run)
        elif mode == "draft-model":
            what_spoils_a_draft_models_cache_is_found(engine, run)
            unverified_drafts_that_are_compacted_are_found(engine, run)
    assert report.blocks_missing == 0
    assert report.finished > 3 and report.aborted > 0
    assert report.views > 0 if mode in DRAFT_STEPS else report.compactions > 0
    if run.marks is not None:
        assert report.rows_read > 100_000
        assert (run.marks.num_drafted > 1000) == (mode in DRAFT_STEPS)
        assert (run.marks.num_verified > 0) == (mode in VERIFIED)
        assert (run.marks.num_rejected > 0) == (mode in VERIFIED)


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


def drafts_that_stay_though_rejected_are_found(engine: Engine, run: random_load.Run) -> None:
    """The worker's sequence goes on behind drafts that were turned down."""
    own = engine.runner.postprocess_sampled

    def forgets(rows: Any, tokens: Any, sampled: Any, rejected: torch.Tensor, *more: Any) -> None:
        own(rows, tokens, sampled, torch.zeros_like(rejected), *more)

    ask(run, engine, "without a fault")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(LoadError, match="a step begins at"):
        patch.setattr(engine.runner, "postprocess_sampled", forgets)
        ask(run, engine, "rejected drafts stay")


def what_spoils_a_draft_models_cache_is_found(engine: Engine, run: random_load.Run) -> None:
    """A compaction of the target changes its row too; its own tokens go one slot early."""
    runner, tables, marks = engine.runner, copy(engine.runner.block_tables), run.marks
    assert marks is not None and marks.draft_model is not None
    assert marks.draft_model.num_rows > 100_000 and marks.num_moved > 10_000
    groups = [manager.kv_cache_spec.layer_group for manager in managers(engine)]
    row = tables.block_tables[groups.index(None)]
    rewrite, slots = runner._rewrite_row, tables.compute_slot_mappings

    def with_the_drafts_row(job: Any) -> None:
        rewrite(job)
        row.stage_write(job.req_index, 0, row.gpu[job.req_index, :2].flip(0).tolist())

    def early(rows: Any, starts: Any, positions: torch.Tensor, *more: Any, **named: Any) -> Any:
        return slots(rows, starts, positions - 1, *more, **named)

    tables.compute_slot_mappings = early  # of the drafter alone
    faults = [
        (runner, "_rewrite_row", with_the_drafts_row, "draft model's .*, row 0: token 32 of"),
        (runner.speculator, "block_tables", tables, "draft model's .*, row 0: token 1 of"),
    ]
    ask(run, engine, "without a fault")
    for owner, name, spoilt, said in faults:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(LoadError, match=said):
            patch.setattr(owner, name, spoilt)
            ask(run, engine, name)


def unverified_drafts_that_are_compacted_are_found(engine: Engine, run: random_load.Run) -> None:
    """The scheduler forgets that drafts of the step under way count as computed.

    It is found where some are turned down right before a compaction, of half the requests.
    """
    with pytest.MonkeyPatch.context() as patch, pytest.raises(LoadError, match="are certain"):
        patch.setattr(scheduler, "num_unverified", lambda request, num_own=0: 0)
        for number in range(8):
            ask(run, engine, f"unverified {number}", num_tokens=20)

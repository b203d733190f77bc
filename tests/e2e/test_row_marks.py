"""Every row that attention reads under random load is one that the policy kept, once, and its own.

The traffic names chats and shared prefixes, is aborted and preempted, and runs with asynchronous
scheduling over four layer groups. Then compactions are spoilt, and the marks must tell.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from lab import random_load
from lab.load_checks import LoadError
from tests.e2e.marked import BLOCK, LENGTH, NUM_TOKENS, ask
from vllm_kvcompress.evaluation.engine import Engine

pytestmark = pytest.mark.engine

LOAD = random_load.Load("reuse", seed=3, max_output=24, async_scheduling=True, marks=True)
STEPS = 30


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with random_load.opened(LOAD) as made:
        yield made


@pytest.fixture(scope="module")
def run(engine: Engine) -> random_load.Run:
    """The load has run; its marks stay."""
    made = random_load.Run(engine, LOAD)
    made.run(STEPS, None)
    return made


def test_attention_reads_what_was_kept(run: random_load.Run, engine: Engine) -> None:
    report, stats = run.report, engine.scheduler.stats
    assert not report.failures, "\n".join([*report.failures, *report.requests, report.command])
    assert run.marks is not None and run.marks.num_moved > 10_000
    assert report.finished > 3 and report.aborted > 0 and report.compactions > 3
    assert stats.session_requests and stats.shared_prefix_requests
    ask(run, engine, "without a fault")


def test_a_row_in_anothers_place_is_found(
    run: random_load.Run, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two survivors of one KV head change places."""
    for layer in engine.runner.compactor.layers:
        for name in ("move", "move_in_place"):
            own = getattr(layer.layout, name)

            def move(caches: Any, group: Any, indices: Any, rotary: Any, own: Any = own) -> None:
                spoilt = indices.clone()
                spoilt[:, :, 0, 4:6] = indices[:, :, 0, 4:6].flip(-1)
                own(caches, group, spoilt, rotary)

            monkeypatch.setattr(layer.layout, name, move)
    with pytest.raises(LoadError, match="head 0, row 4: token"):
        ask(run, engine, "rows change places")


def logical_slots(own: Any, **step: Any) -> None:
    """Right up to the end of the prompt's last block, which stays in both columns of its row."""


def shifted_slots(own: Any, **step: Any) -> None:
    own(**{**step, "positions": step["positions"] - 1})


def slots_of_other_groups(own: Any, **step: Any) -> None:
    own(**{**step, "evicted": step["evicted"].flip(0).contiguous()})


@pytest.mark.parametrize("spoilt", [logical_slots, shifted_slots, slots_of_other_groups])
def test_a_token_in_another_slot_is_found(
    run: random_load.Run, engine: Engine, monkeypatch: pytest.MonkeyPatch, spoilt: Any
) -> None:
    assert LENGTH // BLOCK < (LENGTH + NUM_TOKENS - 2) // BLOCK, "the answer enters a block"
    own = engine.runner._physical_slots
    monkeypatch.setattr(engine.runner, "_physical_slots", partial(spoilt, own))
    with pytest.raises(LoadError, match="rows"):
        ask(run, engine, spoilt.__name__)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu(run: random_load.Run, engine: Engine) -> None:
    """The same engine, where there is a GPU: marks are tensors there, and so are the checks."""
    assert run.marks is not None and run.marks.num_moved > 10_000
    assert engine.runner.compactor.layers[0].cache().is_cuda

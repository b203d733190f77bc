"""Faults in one request's compression, in a real engine: it is answered as without, others as ever.

Asynchronous scheduling: when a step's faults arrive, the next one is on its way and has read what
they left.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lab.random_models import distinct_tokens
from tests.e2e.conftest import assert_idle, feature_of, opened
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.policies.h2o import H2O
from vllm_kvcompress.policies.snapkv import SnapKV
from vllm_kvcompress.worker.codebook.feature import CodebookFeature

pytestmark = pytest.mark.engine

NUM_TOKENS, INTERVAL = 24, 16
SETTING = {
    "preset": "snapkv",
    "budget": {"ratio": 0.25, "floor": 1},
    "observation_window": 8,
    "min_prompt_len": 64,
    "layer_groups": {"count": 4},
    "trigger": "both",
    "interval": INTERVAL,
}
NONE = {"kv_compression": "none"}
VICTIM, *OTHERS = [distinct_tokens(length, n) for n, length in enumerate((600, 633, 601))]

Patch = Callable[[pytest.MonkeyPatch, Engine], None]


@pytest.fixture(scope="module")
def engine(probe_model: str) -> Iterator[Engine]:
    with opened(probe_model, SETTING, async_scheduling=True, max_model_len=1024) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(engine: Engine) -> list[list[int]]:
    """The victim's tokens, then the others', without compression."""
    return run(engine, [NONE] * 3)


@pytest.fixture(scope="module")
def compressed(engine: Engine, plain: list[list[int]]) -> list[list[int]]:
    """And with it."""
    found = run(engine, [None] * 3)
    assert all(map(list.__ne__, found, plain)), "compression shows in the tokens"
    return found


def run(engine: Engine, xargs: list[Any]) -> list[list[int]]:
    engine.scheduler.stats.clear()
    return engine.generate([VICTIM, *OTHERS], NUM_TOKENS, xargs, ignore_eos=True)


def is_victim(inputs: Any) -> bool:
    """Of a policy, by a length that no other request has at the same time."""
    return inputs.rows.num_tokens == len(VICTIM) and inputs.layer_index == 2


def scores(change: Callable[[torch.Tensor], Any]) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
        real = SnapKV.score
        monkeypatch.setattr(
            SnapKV,
            "score",
            lambda self, own: change(real(self, own)) if is_victim(own) else real(self, own),
        )

    return patch


def fail(error: Exception) -> Any:
    raise error


def nan_in_one_place(found: torch.Tensor) -> torch.Tensor:
    found = found.clone()
    found[1, 70] = float("nan")
    return found


FAULTS: dict[str, Patch] = {
    "raises": scores(lambda _: fail(ZeroDivisionError("a policy's own bug"))),
    "NaN": scores(nan_in_one_place),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_request_is_served_uncompressed_and_counted(
    engine, plain, compressed, monkeypatch, fault: str
) -> None:
    FAULTS[fault](monkeypatch, engine)
    found = run(engine, [None] * 3)
    assert found == [plain[0], *compressed[1:]]
    stats = engine.scheduler.stats
    assert stats.failures == {"nan_scores" if fault == "NaN" else "error": 1}
    assert stats.uncompressed == {"failed": 1}
    assert_idle(engine)


def raising(*_: Any, **__: Any) -> Any:
    raise RuntimeError("Triton Error [CUDA]: out of resources")


def no_selection(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    """A launch fails for all that it is for: requests under one policy."""
    compactor = engine.runner.compactor
    real = compactor._select

    def select(group: Any, *args: Any) -> torch.Tensor:
        return raising() if group.jobs[0].config.policy.name == "keydiff" else real(group, *args)

    monkeypatch.setattr(compactor, "_select", select)


def no_summary(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    """In the middle of the forward pass."""
    monkeypatch.setattr(H2O, "accumulate", raising)


def no_codebook(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    writer = feature_of(engine, CodebookFeature).writer
    monkeypatch.setattr(writer, "_code", raising)


@pytest.mark.parametrize(
    ("preset", "patch"),
    [("keydiff", no_selection), ("h2o", no_summary), ("spindlekv", no_codebook)],
)
def test_a_kernel_a_summary_a_codebook(
    engine, plain, compressed, monkeypatch, preset: str, patch: Patch
) -> None:
    patch(monkeypatch, engine)
    found = run(engine, [{"kv_compression": preset}, None, None])
    assert found == [plain[0], *compressed[1:]]
    assert engine.scheduler.stats.failures == {"error": 1}
    assert_idle(engine)


def test_a_compaction_while_decoding(engine, monkeypatch) -> None:
    """What it has said stays said; it goes on from there over a whole cache."""
    options: Any = {"max_tokens": 44, "ignore_eos": True}
    (whole,) = engine.generate([VICTIM], **options)
    engine.scheduler.stats.clear()
    real, failed_at = SnapKV.score, []

    def score(self: SnapKV, inputs: Any) -> torch.Tensor:
        if inputs.position > len(VICTIM):
            failed_at.append(inputs.position)
            raising()
        return real(self, inputs)

    monkeypatch.setattr(SnapKV, "score", score)
    (found,) = engine.generate([VICTIM], **options)
    count = failed_at[0] - len(VICTIM)
    assert len(failed_at) == 1 and INTERVAL <= count < 40
    assert found[:count] == whole[:count]
    assert engine.scheduler.stats.failures == {"error": 1}
    said = [[*VICTIM, *found[:count]]]
    assert found[count:] == engine.generate(said, 44 - count, NONE, ignore_eos=True)[0]
    assert_idle(engine)


def test_no_free_blocks_for_destinations(engine, compressed) -> None:
    """Survivors take the place of evicted tokens then: nothing waits, nothing fails."""
    pool, num_left = engine.pool, 4 * -(-len(VICTIM) // 32) + 4
    engine.scheduler.stats.clear()
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - num_left)
    try:
        (found,) = engine.generate([VICTIM], NUM_TOKENS, ignore_eos=True)
    finally:
        pool.free_blocks(taken)
    assert found == compressed[0]
    stats = engine.scheduler.stats
    assert stats.requests == {"snapkv": 1} and not stats.failures and not stats.uncompressed
    assert stats.blocks_taken["snapkv"] <= 4 < stats.blocks_returned["snapkv"]
    assert_idle(engine)


def test_a_hook_of_a_mode_that_raises(engine, plain, monkeypatch) -> None:
    """For all requests of the step: whose part of it was done nobody knows."""
    monkeypatch.setattr(feature_of(engine, CodebookFeature), "compact", raising)
    assert run(engine, [None] * 3) == plain
    assert engine.scheduler.stats.failures == {"error": 3}
    assert_idle(engine)

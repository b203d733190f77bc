"""Time as an adversary: several steps in flight, each of which happens as late as it can.

The tokens must be those of the same requests on an engine that waits for every step.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu import buffer_utils

from lab.gpu_path.plugin import gpu_path
from tests.e2e.conftest import opened
from tests.gpu_path.late_device import LateDevice, late_device, ready
from tests.gpu_path.scenarios import CODES, DECODING, ENGINE, VIEWS_OF_EVICTED, WINDOW
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.host import hooks
from vllm_kvcompress.worker import lengths, model_runner
from vllm_kvcompress.worker.draft.step import DraftStep

pytestmark = pytest.mark.engine

NUM_TOKENS = 18
DRAFTS = "drafts over an evicted cache"
SETTINGS = {
    "decoding": {**DECODING, "interval": 16},
    "codebooks": CODES,
    DRAFTS: {
        **VIEWS_OF_EVICTED,
        "observation_window": WINDOW,
        "budget": {"tokens": 64, "floor": 1},
        "draft": {"tokens": 4, "budget": {"tokens": 32, "floor": 1}},
    },
}
NUM_PROMPTS = {"codebooks": 2}  # the interpreter is slow in making books
SMALL = {**ENGINE, "max_num_batched_tokens": 160, "enable_prefix_caching": False}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Of which one ends in nearly every step of a chunked prefill."""
    rng = np.random.default_rng(1)
    return [rng.integers(5, 300, 100 + 31 * number).tolist() for number in range(4)]


COPIED = "codebook/meter.py"
"""Whose numbers are copied to the host on a GPU, and read once an event of its own says they are
there."""


def waits(device: LateDevice) -> list[str]:
    """Places in which the host waited for a number, and would on a GPU as well."""
    return [each for each in device.waits if not each.rsplit(":", 1)[0].endswith(COPIED)]


def run(engine: Engine, prompts: list[list[int]]) -> tuple[list[list[int]], int]:
    """Tokens, and steps after the last prompt: they tell how many drafts were accepted."""
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, NUM_TOKENS, ignore_eos=True)
    engine.drain()
    return [engine.results[str(number)].token_ids for number in range(len(prompts))], (
        engine.num_steps
    )


@contextmanager
def adversary(model: str, setting: Any, **more: Any) -> Iterator[tuple[Engine, LateDevice]]:
    """An engine that schedules ahead, on a device that is late."""
    with (
        gpu_path(),
        late_device() as device,
        opened(model, setting, async_scheduling=True, **SMALL | more) as engine,
    ):
        assert engine.core.batch_queue is not None, "asynchronous scheduling is off"
        ready(engine)
        device.deferring = True
        try:
            yield engine, device
        finally:
            device.deferring = False


@pytest.fixture(scope="module")
def expected(probe_model: str, prompts: list[list[int]]) -> Callable[[str], list[list[int]]]:
    """What engines that wait for every step say, made once per setting."""

    @functools.cache
    def of(name: str) -> list[list[int]]:
        with gpu_path(), opened(probe_model, SETTINGS[name], **SMALL) as engine:
            assert engine.core.batch_queue is None
            return run(engine, prompts[: NUM_PROMPTS.get(name)])[0]

    return of


def counts_read_by_drafts(device: LateDevice, patch: pytest.MonkeyPatch) -> list[bool]:
    """One entry per draft step that has run: did it find the evicted counts of its launch?"""
    found: list[bool] = []
    prepare = DraftStep.prepare

    def watched(step: DraftStep, number: int) -> Any:
        attention = prepare(step, number)
        rows = step._rows.requests_np
        read, sent = step._evicted.gpu, step._evicted.np[:, rows]
        device.put(lambda: found.append(bool((read.numpy()[:, rows] == sent).all())))
        return attention

    patch.setattr(DraftStep, "prepare", watched)
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_two_steps_in_flight(
    probe_model: str, prompts, expected, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prompts[: NUM_PROMPTS.get(name)]
    with adversary(probe_model, SETTINGS[name]) as (engine, device):
        counts = counts_read_by_drafts(device, monkeypatch)
        tokens, _ = run(engine, asked)
        stats = engine.scheduler.stats
        assert sum(stats.compactions.values()) >= len(asked)
        if name == DRAFTS:
            assert sum(stats.views.values()) >= len(asked) and len(counts) >= NUM_TOKENS
    assert tokens == expected(name) and all(counts)
    assert not waits(device), "the host waited for a number"
    assert device.longest > 300, "operations of a whole step waited in the queue"


def test_three_steps_in_flight(
    probe_model: str, prompts, expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VllmConfig, "max_concurrent_batches", 3)
    with adversary(probe_model, SETTINGS["decoding"]) as (engine, device):
        assert engine.core.batch_queue_size == 3
        tokens, _ = run(engine, prompts)
    assert tokens == expected("decoding") and not waits(device)


# --- without the mends --------------------------------------------------------------------


def outcome(model: str, setting: Any, prompts: Any) -> Any:
    """Tokens and steps, or what ended the run: blocks that do not exist are found out."""
    try:
        with adversary(model, setting) as (engine, _):
            return run(engine, prompts)
    except Exception as error:
        return error


def test_vllms_own_pools_are_too_small_for_a_compaction(
    probe_model: str, prompts, expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compaction's rows are written late, with what the next step has put in their place."""

    @contextmanager
    def as_they_are(*_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(model_runner, "pools_for_writes_per_step", as_they_are)
    found = outcome(probe_model, SETTINGS["decoding"], prompts)
    assert isinstance(found, Exception) or found[0] != expected("decoding")


class ReadInPlace:
    """What `HostMirror` was: memory of the host that kernels read when they run."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._pool = buffer_utils.UvaBufferPool(shape, torch.int32)
        self.np = np.zeros(shape, dtype=np.int32)
        self.send()

    def send(self) -> None:
        self.gpu = self._pool.copy_to_uva(self.np)


@pytest.mark.parametrize("is_mended", [True, False])
def test_drafts_must_not_read_counts_in_place(
    probe_model: str, prompts, monkeypatch: pytest.MonkeyPatch, is_mended: bool
) -> None:
    """Requests come and go in every step. A request's last drafts run after the output of their
    step, which lets the host give the row to another; what they write then is in others' blocks."""
    if not is_mended:
        monkeypatch.setattr(lengths, "HostMirror", ReadInPlace)
    with adversary(probe_model, SETTINGS[DRAFTS], max_num_seqs=4) as (engine, device):
        counts = counts_read_by_drafts(device, monkeypatch)
        for number in range(12):
            prompt = [7 + number, *prompts[0]]
            engine.add(str(number), prompt, 4 + number % 3, ignore_eos=True)
        engine.drain()
    assert len(counts) > 40 and all(counts) is is_mended


def test_ngrams_of_the_host_would_end_asynchronous_drafts(
    probe_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM schedules ahead with one of its two n-gram methods, which carry our drafts."""
    carrier = hooks._draft_carrier
    monkeypatch.setattr(hooks, "_draft_carrier", lambda *a: {**carrier(*a), "method": "ngram"})
    with (
        pytest.raises(AssertionError, match="asynchronous scheduling is off"),
        adversary(probe_model, SETTINGS[DRAFTS]),
    ):
        pass

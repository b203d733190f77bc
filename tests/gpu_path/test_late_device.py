"""Time as an adversary: several steps in flight, each of which happens as late as it can.

The tokens must be those of the same requests on an engine that waits for every step.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from vllm.config import VllmConfig

from lab.gpu_path.plugin import gpu_path
from tests.e2e.conftest import opened
from tests.gpu_path.late_device import LateDevice, late_device, ready
from tests.gpu_path.scenarios import CODES, DECODING, ENGINE, VIEWS_OF_EVICTED
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.worker import model_runner

pytestmark = pytest.mark.engine

NUM_TOKENS = 18
SETTINGS = {
    "decoding": {**DECODING, "interval": 16},
    "codebooks": CODES,
    "drafts over an evicted cache": {**VIEWS_OF_EVICTED, "budget": {"tokens": 64, "floor": 1}},
}
NUM_PROMPTS = {"codebooks": 2}  # the interpreter is slow in making books
SMALL = {**ENGINE, "max_num_batched_tokens": 160, "enable_prefix_caching": False}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Of which one ends in nearly every step of a chunked prefill."""
    rng = np.random.default_rng(1)
    return [rng.integers(5, 300, 100 + 31 * number).tolist() for number in range(4)]


COPIED = ("codebook/meter.py", "compaction/faults.py")
"""Files whose numbers are copied to the host on a GPU, and read once an event says they are there:
the meter's own, and the one that the step's sampled tokens wait for."""


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
def adversary(model: str, setting: Any) -> Iterator[tuple[Engine, LateDevice]]:
    """An engine that schedules ahead, on a device that is late."""
    with (
        gpu_path(),
        late_device() as device,
        opened(model, setting, async_scheduling=True, **SMALL) as engine,
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


@pytest.mark.parametrize("name", SETTINGS)
def test_two_steps_in_flight(probe_model: str, prompts, expected, name: str) -> None:
    asked = prompts[: NUM_PROMPTS.get(name)]
    with adversary(probe_model, SETTINGS[name]) as (engine, device):
        tokens, _ = run(engine, asked)
        stats = engine.scheduler.stats
        assert sum(stats.compactions.values()) + sum(stats.views.values()) >= len(asked)
    assert tokens == expected(name)
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

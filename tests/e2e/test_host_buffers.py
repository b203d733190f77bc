"""Host buffers that kernels read late: none is written again before the steps in flight are done.

vLLM hands indices, starts and lengths of staged writes to kernels in pinned host buffers, taken in
turn from pools. A kernel reads its buffer when it runs, up to `max_concurrent_batches` steps after
the host wrote it; a pool must be as deep as all writes of these steps.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import UvaBufferPool

from tests.e2e.conftest import FOUR_GROUPS, opened
from vllm_kvcompress.worker.host_buffers import pools_for_writes_per_step

pytestmark = pytest.mark.engine

SMALL = {"budget": {"ratio": 0.3, "floor": 1}, "min_prompt_len": 64}
SETTINGS = {
    "one group": {"preset": "keydiff", **SMALL},
    "four groups": {**FOUR_GROUPS, **SMALL},
    "while decoding": {"preset": "snapkv", "trigger": "both", "interval": 32, **SMALL},
    "draft": {"preset": "snapkv", "mode": "draft", "draft": {"tokens": 3}, **SMALL},
    "codebook": {
        "preset": "spindlekv", "interval": 16, **SMALL, "budget": {"ratio": 0.6, "floor": 1}
    },
}  # fmt: skip


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[int]]:
    """Writes of every pool since the counter was cleared, by identity of the pool."""
    counted: Counter[int] = Counter()
    original = UvaBufferPool.copy_to_uva

    def counting(self: UvaBufferPool, x: Any) -> torch.Tensor:
        counted[id(self)] += 1
        depths[id(self)] = self.max_concurrency
        return original(self, x)

    depths: dict[int, int] = {}
    counted.depths = depths  # type: ignore[attr-defined]
    monkeypatch.setattr(UvaBufferPool, "copy_to_uva", counting)
    yield counted


@pytest.mark.parametrize("name", SETTINGS)
def test_pools_are_as_deep_as_the_writes_of_the_steps_in_flight(
    name: str, probe_model: str, prompts: list[list[int]], writes: Any
) -> None:
    asked = [prompt[: 300 + 37 * number] for number, prompt in enumerate(prompts[:6])]
    with opened(probe_model, SETTINGS[name], async_scheduling=True) as engine:
        runner = engine.runner
        in_flight = runner.vllm_config.max_concurrent_batches
        assert in_flight == 2
        worst: Counter[int] = Counter()
        execute = runner.execute_model

        def counted(*args: Any, **kwargs: Any) -> Any:
            writes.clear()
            output = execute(*args, **kwargs)
            for pool, count in writes.items():
                worst[pool] = max(worst[pool], count)
            return output

        runner.execute_model = counted
        engine.generate(asked, 40)
        stats = engine.scheduler.stats
        assert sum(stats.compactions.values()) + sum(stats.views.values()) >= len(asked)
    for pool, count in worst.items():
        assert count * in_flight <= writes.depths[pool], (count, writes.depths[pool])
    if name != "draft":  # views are no rows of vLLM's tables
        assert max(worst.values()) == 2, "a compaction writes rows a second time"


class LateLaunches:
    """A stand-in for a device's queue: launches run when told, and read what is there then."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.queue = kernel, []  # type: ignore[var-annotated]

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.queue.append((grid, args, kwargs))

    def run(self, count: int) -> None:
        for grid, args, kwargs in self.queue[:count]:
            self.kernel[grid](*args, **kwargs)
        del self.queue[:count]


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("is_deep", [True, False])
def test_a_late_row_rewrite_finds_its_own_row(
    num_groups: int, is_deep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps in flight that both write at their start and, compacting, at their end."""
    late = LateLaunches(buffer_utils._apply_write_kernel)
    monkeypatch.setattr(buffer_utils, "_apply_write_kernel", late)
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)  # no pinned memory here
    with pools_for_writes_per_step(2 if is_deep else 1, steps_in_flight=2):
        tables = BlockTables([16] * num_groups, 8, 64, [4] * num_groups, torch.device("cpu"))
    assert buffer_utils._DEFAULT_MAX_CONCURRENCY == 2

    def write(row: int, first: int) -> None:
        for table in tables.block_tables:
            table.stage_write(row, 0, [first, first + 1])
        tables.apply_staged_writes()

    for row, first in ((1, 10), (2, 20), (3, 30), (4, 40)):  # N start, N end, N+1 start, N+1 end
        write(row, first)
    late.run(len(late.queue))
    expected = [[first, first + 1] for first in (10, 20, 30, 40)]
    found = [table.gpu[1:5, :2].tolist() for table in tables.block_tables]
    assert (found == [expected] * num_groups) is is_deep

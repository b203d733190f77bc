"""Our places in vLLM's start-up: what stays free, and when kernels are compiled."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from vllm.utils import jit_monitor
from vllm.v1.worker import gpu_worker

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.worker.compaction.reserve import table_bytes
from vllm_kvcompress.worker.compaction.working_memory import RankShape, compaction_bytes
from vllm_kvcompress.worker.features import make_features
from vllm_kvcompress.worker.gpu_worker import CompressedGPUWorker
from vllm_kvcompress.worker.modes import MODES

GIB = 1 << 30
SHAPE = RankShape(32, range(32), 32, 8, 128, 4096, torch.bfloat16, 16, 131072, 1024)
TABLE = 1024 * 8192 * 4


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_kernels_are_compiled_after_the_graphs_and_before_vllm_watches(
    monkeypatch, enforce_eager: bool
) -> None:
    """vLLM's own method runs here, around a worker that has no device."""
    order: list[str] = []
    worker = MagicMock(
        spec=CompressedGPUWorker, cache_config=MagicMock(), model_config=MagicMock(),
        vllm_config=MagicMock(), parallel_config=MagicMock(), compilation_config=MagicMock(),
        observability_config=MagicMock(jit_monitor_mode="error"), model_runner=MagicMock(),
        device=None,
    )  # fmt: skip
    worker.model_config.enforce_eager = enforce_eager
    worker.cache_config.kv_cache_memory_bytes = 1
    worker.use_v2_model_runner, worker.cudagraph_memory_estimate = True, 0
    worker._maybe_activate_jit_monitor = lambda: (
        CompressedGPUWorker._maybe_activate_jit_monitor(worker)
    )
    # Where vLLM 0.33 has it in two methods, the inner one.
    inner = getattr(gpu_worker.Worker, "_compile_or_warm_up_model", None)
    worker._compile_or_warm_up_model = lambda: inner and inner(worker)
    runner = worker.model_runner
    runner.capture_model.side_effect = lambda: order.append("graphs") or 0
    runner.warm_up_compaction.side_effect = lambda: order.append("ours")
    for name in ("kernel_warmup", "warmup_kernels", "set_random_seed", "freeze_gc_heap",
                 "maybe_attach_gc_debug_callback"):  # fmt: skip
        monkeypatch.setattr(gpu_worker, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(gpu_worker, "enable_gpu_sync_check", lambda: order.append("sync check"))
    monkeypatch.setattr(jit_monitor, "activate", lambda **kwargs: order.append(kwargs["mode"]))
    gpu_worker.Worker.compile_or_warm_up_model(worker)
    graphs = [] if enforce_eager else ["graphs"]
    assert order == [*graphs, "ours", "error", "sync check"]


@pytest.mark.parametrize(
    ("setting", "num_tables"),
    [
        ({"preset": "auto"}, 0),  # vLLM has two for any model
        ({"preset": "auto", "layer_groups": {"count": 32}}, 2 * 31),
        ({"preset": "auto", "mode": "draft"}, 2),
        ({"preset": "auto", "mode": "draft", "layer_groups": {"count": 4}}, 2 * 3 + 2 * 4),
    ],
)
def test_block_tables_of_further_groups_are_counted(setting: Any, num_tables: int) -> None:
    config = parse_config(setting)
    runner: Any = SimpleNamespace(
        model_state=SimpleNamespace(config=config), device=torch.device("cpu")
    )
    features = make_features(MODES, config, runner)
    num_further = sum(feature.num_block_tables() for feature in features)
    assert table_bytes(config, SHAPE, num_further) == num_tables * TABLE


def test_the_cache_leaves_room_for_compactions(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = MagicMock(spec=CompressedGPUWorker, cache_config=MagicMock(), model_runner=MagicMock())
    runner = worker.model_runner
    layer = SimpleNamespace(
        num_heads=32, num_kv_heads=8, head_size=128, kv_cache_torch_dtype=torch.bfloat16
    )
    layers = {f"model.layers.{n}.attn": layer for n in range(32)}
    runner.compacted_layers = MagicMock(
        **{"by_name.return_value": layers, "__len__.return_value": 32}
    )
    runner.compacted_layers.place.side_effect = list(layers).index
    runner.model_config.get_hidden_size.return_value = 4096
    runner.cache_config.block_size, runner.max_model_len, runner.max_num_reqs = 16, 131072, 1024
    runner.model_state.config = config = parse_config({"preset": "snapkv"})
    monkeypatch.setattr(gpu_worker.Worker, "determine_available_memory", lambda self: 40 * GIB)
    worker.cache_config.kv_cache_memory_bytes = None
    reserve = compaction_bytes(config, SHAPE)
    assert 0.1 * GIB < reserve < 2 * GIB
    assert CompressedGPUWorker.determine_available_memory(worker) == 40 * GIB - reserve
    worker.cache_config.kv_cache_memory_bytes = 40 * GIB
    assert CompressedGPUWorker.determine_available_memory(worker) == 40 * GIB, (
        "the user's own number"
    )

"""Our warm-up's place in vLLM's start-up."""

from unittest.mock import MagicMock

import pytest
from vllm.utils import jit_monitor
from vllm.v1.worker import gpu_worker

from vllm_kvcompress.worker.gpu_worker import CompressedGPUWorker


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

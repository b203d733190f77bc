"""The GPU's worker."""

from vllm.logger import init_logger
from vllm.utils.mem_utils import format_gib
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvcompress.worker.compaction.reserve import reserved_bytes
from vllm_kvcompress.worker.model_runner import CompressedGPUModelRunner

logger = init_logger(f"vllm.{__name__}")


class CompressedGPUWorker(Worker):
    """GPU worker."""

    def determine_available_memory(self) -> int:
        """Leave room for what compactions hold; a size that the user gave stays as it is."""
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes:
            return available
        reserve = reserved_bytes(self.model_runner)
        logger.info("KV compression: %s GiB stay free for compactions", format_gib(reserve))
        return max(available - reserve, 0)

    def _maybe_activate_jit_monitor(self) -> None:
        """Compile the kernels of compactions, then let vLLM watch for compilations.

        The last thing that vLLM's `compile_or_warm_up_model` does before it watches: from then on
        a kernel that is compiled counts as one that a request waited for, and ends the worker under
        ``--jit-monitor-mode=error``.
        """
        self.model_runner.warm_up_compaction()
        super()._maybe_activate_jit_monitor()

    def _make_model_runner(self) -> CompressedGPUModelRunner:
        return CompressedGPUModelRunner(self.vllm_config, self.device)

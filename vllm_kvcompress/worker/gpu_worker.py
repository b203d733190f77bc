"""The GPU's worker."""

from vllm.v1.worker.gpu_worker import Worker

from vllm_kvcompress.worker.model_runner import CompressedGPUModelRunner


class CompressedGPUWorker(Worker):
    """GPU worker."""

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

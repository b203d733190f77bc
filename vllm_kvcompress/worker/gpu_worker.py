"""The GPU's worker."""

from vllm.v1.worker.gpu_worker import CompilationTimes, Worker

from vllm_kvcompress.worker.model_runner import CompressedGPUModelRunner


class CompressedGPUWorker(Worker):
    """GPU worker."""

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Warm up as the host does, then compile the kernels of compactions."""
        times = super().compile_or_warm_up_model()
        self.model_runner.warm_up_compaction()
        return times

    def _make_model_runner(self) -> CompressedGPUModelRunner:
        return CompressedGPUModelRunner(self.vllm_config, self.device)

"""The GPU's worker."""

from vllm.v1.worker.gpu_worker import Worker

from vllm_kvcompress.worker.model_runner import CompressedGPUModelRunner


class CompressedGPUWorker(Worker):
    """GPU worker."""

    def _make_model_runner(self) -> CompressedGPUModelRunner:
        return CompressedGPUModelRunner(self.vllm_config, self.device)

"""The CPU's worker; a module of its own, because vLLM's sets up the process when imported."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvcompress.worker.model_runner import CompressedCPUModelRunner


class CompressedCPUWorker(CPUWorker):
    """CPU worker."""

    def init_device(self) -> None:
        """Set up as the host does, then put our runner in the place of its runner.

        vLLM's CPU worker builds its runner inside this method and offers no hook; the one it
        made holds no weights and no cache yet.
        """
        super().init_device()
        self.model_runner = CompressedCPUModelRunner(self.vllm_config, self.device)

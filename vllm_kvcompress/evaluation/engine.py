"""An engine in this process, stepped by hand, whose books can be looked into.

For tests and measurements: one process, greedy decoding, prompts as token ids. Requests run
through vLLM's real scheduler, workers and kernels.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

# Read by vLLM when it is imported: keep engine, scheduler and worker in this process.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@dataclass
class Result:
    """What became of one request.

    Attributes
    ----------
    token_ids : list[int]
        Generated tokens so far.
    num_cached_tokens : int or None
        Prompt tokens found in the prefix cache.
    finished : bool
        Whether it ran to its end.
    """

    token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int | None = None
    finished: bool = False


class Engine:
    """A vLLM engine in this process.

    Parameters
    ----------
    model : str
        Folder of the model.
    setting : str, mapping or None
        ``additional_config["kv_compression"]``; None leaves stock vLLM.
    num_blocks : int or None
        Size of the block pool; None takes 256 MiB.
    async_scheduling : bool
        Schedule one step ahead wherever vLLM does so on a GPU. On a CPU the platform switches it
        off; this keeps what vLLM has decided before.
    **engine_args
        Further arguments of ``vllm.LLM``.
    """

    def __init__(
        self,
        model: str,
        setting: str | Mapping[str, Any] | None,
        num_blocks: int | None = None,
        async_scheduling: bool = False,
        **engine_args: Any,
    ) -> None:
        from vllm import LLM

        arguments: dict[str, Any] = {
            "model": model,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 8192,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 1024,
            "block_size": 32,
            "kv_cache_memory_bytes": 256 << 20,
            "num_gpu_blocks_override": num_blocks,
            "seed": 0,
            **engine_args,
        }
        if setting is not None:
            arguments["additional_config"] = {"kv_compression": setting}
        with _cpu_async_scheduling(async_scheduling):
            self.llm = LLM(**arguments)
        self.num_steps = 0
        self.results: dict[str, Result] = {}
        self._preemptions: dict[str, int] = {}

    # --- looking in -----------------------------------------------------------------------

    @property
    def engine(self) -> Any:
        """vLLM's LLMEngine."""
        return self.llm.llm_engine

    @property
    def core(self) -> Any:
        """vLLM's EngineCore."""
        return self.engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        """The scheduler in use."""
        return self.core.scheduler

    @property
    def runner(self) -> Any:
        """The model runner in use."""
        worker = self.core.model_executor.driver_worker
        return getattr(worker, "worker", worker).model_runner

    @property
    def pool(self) -> Any:
        """The block pool."""
        return self.scheduler.kv_cache_manager.block_pool

    def live(self) -> dict[str, Any]:
        """The scheduler's requests by the id they were added under (vLLM appends to it)."""
        requests = self.scheduler.requests
        return {key.rsplit("-", 1)[0]: request for key, request in requests.items()}

    @property
    def num_usable_blocks(self) -> int:
        """Blocks of the pool without the null block."""
        return self.pool.num_gpu_blocks - 1

    @property
    def num_preemptions(self) -> int:
        """Preemptions of all requests so far."""
        return sum(self._preemptions.values())

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a prompt, special tokens included."""
        return self.llm.get_tokenizer().encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens."""
        return self.llm.get_tokenizer().decode(token_ids, skip_special_tokens=True)

    # --- running --------------------------------------------------------------------------

    def add(
        self,
        request_id: str,
        prompt: Sequence[int] | Mapping[str, Any],
        max_tokens: int = 10,
        xargs: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> None:
        """Queue a greedy request. `xargs` is what ``vllm_xargs`` is over HTTP.

        A prompt is token ids, or what vLLM takes for one, with images for example.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, extra_args=dict(xargs or {}) or None, **sampling
        )
        self.results[request_id] = Result()
        given = prompt if isinstance(prompt, Mapping) else {"prompt_token_ids": list(prompt)}
        self.engine.add_request(request_id, given, params)

    def step(self) -> None:
        """Run one engine step and collect what it produced."""
        self.num_steps += 1
        outputs = self.engine.step()
        for request in self.scheduler.requests.values():
            self._preemptions[request.request_id] = request.num_preemptions
        for output in outputs:
            result = self.results[output.request_id]
            result.token_ids = list(output.outputs[0].token_ids)
            result.num_cached_tokens = output.num_cached_tokens
            result.finished = output.finished

    def abort(self, request_id: str) -> None:
        """Abort a request."""
        self.engine.abort_request([request_id])

    def drain(self, max_steps: int = 20_000) -> int:
        """Step until nothing is left; return how many steps that took."""
        before = self.num_steps
        while self.engine.has_unfinished_requests():
            self.step()
            if self.num_steps - before > max_steps:
                raise RuntimeError(f"the engine did not drain within {max_steps} steps")
        return self.num_steps - before

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 10,
        xargs: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        name: str = "request",
        **sampling: Any,
    ) -> list[list[int]]:
        """Run prompts to their end and return their tokens. `xargs`: one for all, or one each."""
        each = [xargs] * len(prompts) if xargs is None or isinstance(xargs, Mapping) else xargs
        ids = [f"{name}-{len(self.results)}-{index}" for index in range(len(prompts))]
        for request_id, prompt, extra in zip(ids, prompts, each, strict=True):
            self.add(request_id, prompt, max_tokens, extra, **sampling)
        self.drain()
        return [self.results[request_id].token_ids for request_id in ids]

    def close(self) -> None:
        """Shut the engine down, so that another can start in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        # The client's own: once it has run, it does not run again when the client is collected,
        # which may be while another engine is at work.
        self.engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()


@contextmanager
def _cpu_async_scheduling(enabled: bool) -> Iterator[None]:
    """Let a CPU engine schedule ahead where a GPU's would: the platform forbids it in one line."""
    from vllm.platforms import current_platform

    if not enabled or not current_platform.is_cpu():
        yield
        return
    platform = type(current_platform)
    original = platform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        decided = vllm_config.scheduler_config.async_scheduling
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = decided

    with patch.object(platform, "check_and_update_config", staticmethod(check_and_update_config)):
        yield

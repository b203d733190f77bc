"""vLLM's own schedulers with our classes on top, without workers: their tokens are made up here.

No model runs, so this is cheap, and works with the Python files of a vLLM of which there is no
build. With asynchronous scheduling a step's tokens arrive once the next step is scheduled.
"""

import random
from collections import deque
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_kvcompress.core.scheduler import (
    CompressedAsyncScheduler,
    CompressedScheduler,
    CompressionMixin,
)
from vllm_kvcompress.core.tracked_request import Phase
from vllm_kvcompress.host.hooks import install_hooks
from vllm_kvcompress.spec import CompressedAttentionSpec

BLOCK, NUM_DRAFTS, STOP = 16, 3, 5
SETTING = {
    "preset": "keydiff",
    "budget": {"tokens": 32, "floor": 1},
    "min_prompt_len": 0,
    "layer_groups": {"count": 2},
}
LOOPS = {
    "sync": (CompressedScheduler, 0),
    "async": (CompressedAsyncScheduler, 0),
    "sync with drafts": (CompressedScheduler, NUM_DRAFTS),
    "async with drafts": (CompressedAsyncScheduler, NUM_DRAFTS),
}


class Loop:
    """A scheduler, and workers that know nothing but what they are told."""

    block_size = BLOCK

    def __init__(
        self, model: str, kind: type, num_drafts: int, num_blocks: int, setting: Any = SETTING,
        max_num_seqs: int = 4, window: int | None = None,
    ) -> None:  # fmt: skip
        install_hooks()
        init_none_hash(sha256)
        drafts = {"method": "ngram_gpu", "num_speculative_tokens": num_drafts}
        args = EngineArgs(
            model=model, dtype="float32", block_size=BLOCK, max_model_len=512,
            max_num_seqs=max_num_seqs, max_num_batched_tokens=64,
            additional_config={"kv_compression": setting},
            speculative_config=drafts if num_drafts else None,
        )  # fmt: skip
        config = args.create_engine_config()
        full = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        groups = [
            KVCacheGroupSpec([f"layer.{n}"], CompressedAttentionSpec.from_full(full, n))
            for n in range(2)
        ]
        if window is not None:
            beside = SlidingWindowSpec(
                block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32,
                sliding_window=window,
            )  # fmt: skip
            groups.append(KVCacheGroupSpec(["windowed"], beside))
        cache = KVCacheConfig(num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        config.cache_config.num_gpu_blocks = num_blocks
        with set_current_vllm_config(config):
            scheduler = kind(  # with keywords, as vLLM's engine makes it
                vllm_config=config, kv_cache_config=cache, block_size=BLOCK, hash_block_size=BLOCK,
                structured_output_manager=StructuredOutputManager(config),
            )  # fmt: skip
        self._begin(scheduler)

    def _begin(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.num_ahead = 1 if isinstance(scheduler, AsyncScheduler) else 0
        self.under_way: deque[Any] = deque()
        self.random = random.Random(7)
        self.finished: set[str] = set()
        self.hits: dict[str, int] = {}
        self.num_steps, self.max_steps = 0, 1000
        self.stop_next = False

    def add(
        self,
        name: str,
        prompt: list[int],
        max_tokens: int = 40,
        xargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Request:
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=[STOP], extra_args=xargs)
        hasher = get_request_block_hasher(self.block_size, sha256)
        request = Request(name, prompt, params, None, block_hasher=hasher, **options)
        self.scheduler.add_request(request)
        return request

    def step(self) -> bool:
        """Schedule a step and take in what is due; False once all requests are through."""
        self.num_steps += 1
        assert self.num_steps < self.max_steps, "the loop does not end"
        output = self.scheduler.schedule()
        self._check()
        requests = [self.scheduler.requests[name] for name in output.num_scheduled_tokens]
        sampled = {each.request_id for each in requests if not each.is_prefill_chunk}
        self.under_way.append((output, sampled))
        while len(self.under_way) > self.num_ahead:
            self._take(*self.under_way.popleft())
        for new in output.scheduled_new_reqs:
            self.hits[new.req_id] = new.num_computed_tokens
        return bool(self.scheduler.requests)

    def _take(self, output: Any, sampled: set[str]) -> None:
        names = list(output.num_scheduled_tokens)
        tokens = [self._tokens(name, output) if name in sampled else [] for name in names]
        results = ModelRunnerOutput(names, {name: n for n, name in enumerate(names)}, tokens)
        for answers in self.scheduler.update_from_output(output, results).values():
            self.finished |= {each.request_id for each in answers.outputs if each.finished}
        self._check()
        for name, request in self.scheduler.requests.items():
            assert 0 <= request.num_output_placeholders <= 2 * (1 + NUM_DRAFTS), name
            if self.scheduler.num_spec_tokens and not self.num_ahead:
                request.spec_token_ids = [7] * NUM_DRAFTS  # what an n-gram drafter would send

    def _check(self) -> None:
        if isinstance(self.scheduler, CompressionMixin):  # else it is stock vLLM's
            self.scheduler.check_integrity()

    def _tokens(self, name: str, output: Any) -> list[int]:
        """One, and so many of the step's drafts."""
        drafts = output.scheduled_spec_decode_tokens.get(name, ())
        count = 1 + self.random.randint(0, len(drafts))
        tokens = [self.random.randint(10, 200) for _ in range(count)]
        if self.stop_next and count > 2:
            tokens[0], self.stop_next = STOP, False  # the others are trimmed
        return tokens

    def run(self) -> None:
        while self.step():
            pass

    def hashed_blocks(self) -> int:
        pool = self.scheduler.kv_cache_manager.block_pool
        return sum(block.block_hash is not None for block in pool.blocks)


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest, probe_model: str) -> Loop:
    return Loop(probe_model, *LOOPS[request.param], num_blocks=200)


def prompt(length: int, first: int = 0) -> list[int]:
    return [20 + (first + n) % 97 for n in range(length)]


def test_requests_are_compacted_and_give_everything_back(loop: Loop) -> None:
    free = loop.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    for number, length in enumerate((100, 150, 40, 200, 33, 90)):
        loop.add(f"r{number}", prompt(length, number))
    evicted = set()
    while loop.step():
        for manager in loop.scheduler.kv_cache_manager.coordinator.single_type_managers:
            evicted |= manager.evicted.keys()
    assert evicted >= {"r0", "r1", "r3", "r5"}
    assert loop.finished == {f"r{number}" for number in range(6)}
    assert not loop.scheduler.requests
    assert loop.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free


def test_a_prefix_hit_is_taken_and_what_was_compacted_is_not_hashed(loop: Loop) -> None:
    loop.add("first", prompt(100), max_tokens=60)
    loop.run()
    # Full blocks of the prompt, in two groups; not one of the tokens behind a compaction.
    assert loop.hashed_blocks() == 2 * (100 // BLOCK)
    loop.add("second", prompt(100), max_tokens=8)
    loop.run()
    assert loop.hits == {"first": 0, "second": 96}


def test_a_preempted_request_starts_again(probe_model: str) -> None:
    for kind, num_drafts in LOOPS.values():
        loop = Loop(probe_model, kind, num_drafts, num_blocks=32)
        for number in range(3):
            loop.add(f"r{number}", prompt(100, 31 * number), max_tokens=120)
        most = 0
        while loop.step():
            requests = loop.scheduler.requests.values()
            most = max([most, *(each.num_preemptions for each in requests)])
        assert most > 0 and loop.finished == {"r0", "r1", "r2"}


@pytest.mark.parametrize("name", ["sync with drafts", "async with drafts"])
def test_tokens_behind_a_stop_are_trimmed(name: str, probe_model: str) -> None:
    """vLLM 0.33 takes them out of `num_computed_tokens`, too; nothing of the request is left."""
    loop = Loop(probe_model, *LOOPS[name], num_blocks=200)
    free = loop.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    request, other = loop.add("r0", prompt(100)), loop.add("r1", prompt(64))
    while loop.scheduler.planner.requests["r0"].phase is not Phase.DONE:
        assert loop.step()
    loop.stop_next = True
    loop.run()
    assert not loop.stop_next and loop.finished == {"r0", "r1"}
    assert STOP in (request.output_token_ids[-1], other.output_token_ids[-1])
    assert loop.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free

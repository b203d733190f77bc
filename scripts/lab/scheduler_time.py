"""Scheduler time per decode step where memory is ample, against stock vLLM's scheduler.

    python scripts/lab/scheduler_time.py

vLLM's own scheduler and ours, without workers: the tokens are made up here. 16 requests decode, one
step of each scheduler after the other, so that what else the machine does hits all alike.
Microseconds of the thread's own CPU time: `schedule`, and `update_from_output` with it.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a file: Python puts this folder on its path, `lab` is one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from lab.places import PROBE_MODEL

NUM_REQUESTS, PROMPT_LEN, BLOCK, NUM_BLOCKS = 16, 256, 32, 2000
_SETTING: Mapping[str, Any] = {
    "preset": "snapkv", "budget": {"ratio": 0.5, "floor": 1}, "min_prompt_len": 0
}  # fmt: skip
SETTINGS: dict[str, Mapping[str, Any] | None] = {
    "stock": None,
    "pressure": {**_SETTING, "trigger": "pressure"},
    "nothing to evict": {**_SETTING, "min_prompt_len": 10 * PROMPT_LEN},
}
"""A policy that reads queries, which nobody records while memory is ample."""


def make_scheduler(
    setting: Mapping[str, Any] | None,
    num_blocks: int = NUM_BLOCKS,
    max_num_seqs: int = NUM_REQUESTS,
) -> Any:
    """A scheduler over one KV cache group, without requests."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from vllm_kvcompress.core.scheduler import CompressedScheduler
    from vllm_kvcompress.host.hooks import install_hooks
    from vllm_kvcompress.spec import CompressedAttentionSpec

    install_hooks()
    init_none_hash(sha256)
    config = EngineArgs(
        model=str(PROBE_MODEL), dtype="float32", block_size=BLOCK, max_model_len=4096,
        max_num_seqs=max_num_seqs, max_num_batched_tokens=4096,
        additional_config={} if setting is None else {"kv_compression": setting},
    ).create_engine_config()  # fmt: skip
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    own = spec if setting is None else CompressedAttentionSpec.from_full(spec, 0)
    cache = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer.0"], own)])
    config.cache_config.num_gpu_blocks = num_blocks
    kind = Scheduler if setting is None else CompressedScheduler
    with set_current_vllm_config(config):
        return kind(config, cache, StructuredOutputManager(config), BLOCK, BLOCK)


def add(scheduler: Any, prompts: Sequence[list[int]], max_tokens: int) -> None:
    """Requests of so many output tokens, called by their numbers."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    hasher = get_request_block_hasher(BLOCK, sha256)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        scheduler.add_request(Request(str(number), prompt, params, None, block_hasher=hasher))


def step(scheduler: Any) -> tuple[float, float]:
    """One step; microseconds of scheduling, and of all of it."""
    from vllm.v1.outputs import ModelRunnerOutput

    start = time.thread_time()
    output = scheduler.schedule()
    scheduled = time.thread_time()
    names = list(output.num_scheduled_tokens)
    rows = {name: number for number, name in enumerate(names)}
    results = ModelRunnerOutput(names, rows, [[30 + number] for number in range(len(names))])
    between = time.thread_time()
    scheduler.update_from_output(output, results)
    updated = time.thread_time()
    return 1e6 * (scheduled - start), 1e6 * (scheduled - start + updated - between)


def main() -> int:
    """Print medians, and ratios to stock's; 1 if pressure costs 5 % more than stock."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    schedulers = {name: make_scheduler(setting) for name, setting in SETTINGS.items()}
    for scheduler in schedulers.values():
        numbers = range(NUM_REQUESTS)
        prompts = [[20 + (7 * n + place) % 4000 for place in range(PROMPT_LEN)] for n in numbers]
        add(scheduler, prompts, max_tokens=3000)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
    for number in range(args.steps + 20):
        for name, scheduler in schedulers.items():
            times = step(scheduler)
            if number >= 20:  # the first are prompts
                found[name].append(times)
    ours = schedulers["pressure"]
    assert not ours.stats.compactions and not ours.pressure.is_on, "memory was scarce"
    medians = {
        name: [statistics.median(times) for times in zip(*each, strict=True)]
        for name, each in found.items()
    }
    for name, both in medians.items():
        ratios = [own / stock for own, stock in zip(both, medians["stock"], strict=True)]
        print(
            f"{name:18} schedule {both[0]:6.1f} us ({ratios[0]:.2f} x stock), "
            f"with update_from_output {both[1]:6.1f} us ({ratios[1]:.2f} x stock)"
        )
    return int(medians["pressure"][1] > 1.05 * medians["stock"][1])


if __name__ == "__main__":
    sys.exit(main())

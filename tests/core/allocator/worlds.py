"""What a run of the allocator's model is about: layer groups, setting, scheduling, pool.

Blocks have 4 tokens and the longest sequence 128, so that a few steps fill, compact and exhaust
them.
"""

from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.structured_output import StructuredOutputManager

from tests.conftest import PROBE_MODEL
from vllm_kvcompress.config.reading import CONFIG_KEY, parse_config
from vllm_kvcompress.core.scheduler import CompressedAsyncScheduler, CompressedScheduler
from vllm_kvcompress.host.checks import check_setting
from vllm_kvcompress.host.hooks import install_hooks
from vllm_kvcompress.spec import CompressedAttentionSpec

BLOCK, MAX_LEN, CHUNK, SEQS = 4, 128, 24, 4
NUM_DRAFTS, INTERVAL, WINDOW = 2, 8, 10
"""Drafted tokens a step, generated tokens between compactions, tokens that windowed layers see."""

TRIGGERS = ("end_of_prompt", "interval", "both", "prompt", "all", "pressure")
STAGES = 3
"""Of a pipeline: with asynchronous scheduling two steps are under way while another is planned."""


@dataclass(frozen=True)
class World:
    """One engine's shape; defaults are what a failure shrinks to.

    Attributes
    ----------
    groups : int
        Layer groups.
    beside : str
        Groups of the host beside them: "", "window" or "states".
    is_async, is_pipeline : bool
        How far steps are scheduled ahead.
    drafts : str
        "" for none, "tokens" for stock speculation, "views" for the mode draft, "beside" for views
        beside an eviction.
    trigger : str
        One of `TRIGGERS`.
    reads_queries : bool
        Whether the policy reads queries.
    always : bool
        ``shared_blocks: always``.
    is_uneven : bool
        Whether layer groups keep different numbers of tokens.
    room : float
        Blocks of the pool, in requests of the longest length.
    has_priorities : bool
        vLLM's scheduling policy.
    """

    groups: int = 1
    beside: str = ""
    is_async: bool = False
    is_pipeline: bool = False
    drafts: str = ""
    trigger: str = "end_of_prompt"
    reads_queries: bool = False
    always: bool = False
    is_uneven: bool = False
    room: float = 1.0
    has_priorities: bool = False

    def allowed(self) -> "World":
        """The nearest one that the plugin does not refuse."""
        drafts, trigger, always = self.drafts, self.trigger, self.always
        if self.is_pipeline or self.beside == "states":
            drafts = ""
        if drafts in ("views", "beside"):
            trigger = "prompt" if drafts == "beside" and trigger == "prompt" else "end_of_prompt"
        if trigger == "pressure" or drafts == "views":
            always = False
        return replace(self, drafts=drafts, trigger=trigger, always=always)

    @property
    def setting(self) -> dict[str, Any]:
        """``additional_config["kv_compression"]``."""
        policy: dict[str, Any] = {"name": "snapkv", "kernel_size": 1}
        found: dict[str, Any] = {
            "preset": "keydiff",
            "budget": {"tokens": 12, "floor": 1},
            "min_prompt_len": 0,
            "num_sink_tokens": 1,
            "observation_window": 3,
            "layer_groups": {"count": self.groups},
            "trigger": self.trigger,
        }
        if self.trigger not in ("end_of_prompt", "prompt"):
            found["interval"] = INTERVAL
        if self.trigger in ("prompt", "all"):
            found["prompt_interval"] = 16
        if self.reads_queries:
            found |= {"preset": "snapkv", "policy": policy}
        if self.is_uneven:
            found["layer_budget"] = {"shape": "linear", "beta": 0.1}
        if self.always:
            found["shared_blocks"] = "always"
        if self.drafts == "views":
            found |= {"mode": "draft", "draft": {"tokens": NUM_DRAFTS, "refresh_every": INTERVAL}}
        if self.drafts == "beside":
            found["draft"] = {"tokens": NUM_DRAFTS, "budget": {"tokens": 4, "floor": 1}}
        return found

    @property
    def num_ahead(self) -> int:
        """Steps under way while another is scheduled."""
        if self.is_pipeline:
            return STAGES - 1
        return int(self.is_async)


worlds = st.builds(
    World,
    groups=st.integers(1, 4),
    beside=st.sampled_from(["", "", "window", "states"]),
    is_async=st.booleans(),
    is_pipeline=st.sampled_from([False, False, True]),
    drafts=st.sampled_from(["", "", "tokens", "views", "beside"]),
    trigger=st.sampled_from(TRIGGERS),
    reads_queries=st.booleans(),
    always=st.booleans(),
    is_uneven=st.booleans(),
    room=st.sampled_from([1.0, 1.3, 2.5]),
    has_priorities=st.booleans(),
).map(World.allowed)


@cache
def _host_config(drafts: str, has_priorities: bool) -> Any:
    """vLLM's part of the configuration; making one takes as long as twenty steps."""
    install_hooks()
    init_none_hash(sha256)
    ngram = {"method": "ngram_gpu", "num_speculative_tokens": NUM_DRAFTS}
    args = EngineArgs(
        model=str(PROBE_MODEL), dtype="float32", block_size=32, max_model_len=MAX_LEN,
        max_num_seqs=SEQS, max_num_batched_tokens=CHUNK, seed=0,
        scheduling_policy="priority" if has_priorities else "fcfs",
        additional_config={CONFIG_KEY: World(drafts=drafts).setting},
        speculative_config=ngram if drafts == "tokens" else None,
    )  # fmt: skip
    config = args.create_engine_config()
    config.cache_config.block_size = BLOCK
    return config


def _ahead(number: int) -> type[VllmConfig]:
    """A configuration with so many steps under way: vLLM derives it from the executor's."""
    return type("VllmConfig", (VllmConfig,), {"max_concurrent_batches": 1 + number})


_AHEAD = [_ahead(number) for number in range(STAGES)]


def vllm_config(world: World) -> Any:
    """Its configuration, with a setting that the plugin has checked."""
    config = copy(_host_config(world.drafts, world.has_priorities))
    config.__class__ = _AHEAD[world.num_ahead]
    setting = parse_config(world.setting)
    assert setting is not None
    check_setting(setting, config)
    config.additional_config = {CONFIG_KEY: setting.to_dict()}
    config.cache_config = copy(config.cache_config)
    config.cache_config.mamba_cache_mode = "align" if world.beside == "states" else "none"
    return config


def _specs(world: World) -> list[KVCacheSpec]:
    common: dict[str, Any] = {
        "block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32
    }  # fmt: skip
    full = FullAttentionSpec(**common)
    specs: list[KVCacheSpec] = [
        CompressedAttentionSpec.from_full(full, number, world.groups)
        for number in range(world.groups)
    ]
    if world.beside == "window":
        specs.append(SlidingWindowSpec(**common, sliding_window=WINDOW))
    if world.beside == "states":
        specs.append(
            MambaSpec(
                block_size=BLOCK, shapes=((64,),), dtypes=(torch.float32,),
                mamba_cache_mode="align",
            )
        )  # fmt: skip
    return specs


def _longest(world: World, config: Any) -> int:
    """Blocks that the longest request needs: the least that vLLM starts with."""
    return sum(
        -(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes) for spec in _specs(world)
    )


def scheduler_of(world: World) -> Any:
    """vLLM's scheduler with our classes on top, and nothing under it."""
    config = vllm_config(world)
    num_blocks = 1 + int(_longest(world, config) * world.room)
    groups = [KVCacheGroupSpec([f"layer.{n}"], spec) for n, spec in enumerate(_specs(world))]
    config.cache_config.num_gpu_blocks = num_blocks
    made = KVCacheConfig(num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    kind = CompressedAsyncScheduler if world.is_async else CompressedScheduler
    with set_current_vllm_config(config):
        scheduler = kind(config, made, StructuredOutputManager(config), BLOCK, BLOCK)
    if world.is_pipeline and isinstance(scheduler, AsyncScheduler):
        scheduler.pp_size = scheduler.decode_stagger = STAGES
    return scheduler

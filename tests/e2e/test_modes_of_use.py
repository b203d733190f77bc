"""Ways to run an engine that compression does not know of: LoRA, KV events, pauses, two ranks."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_utils import (
    get_block_hash,
    get_group_id,
    maybe_convert_block_hash,
)
from vllm.v1.core.sched.interface import PauseState

from tests.e2e.conftest import assert_idle, opened
from vllm_kvcompress.core.planner import State
from vllm_kvcompress.evaluation.engine import Engine, Result

pytestmark = pytest.mark.engine

MAX_LEN = 1024
SETTING = {"preset": "snapkv", "budget": {"ratio": 0.25}, "min_prompt_len": 128}
SETTINGS = {
    "evict": {**SETTING, "trigger": "both", "interval": 64},
    "draft": {**SETTING, "mode": "draft", "draft": {"tokens": 3}},
}
ARGS = {"max_model_len": MAX_LEN, "enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
EVENTS = {"enable_kv_cache_events": True, "publisher": "null"}
RANK = 8


@pytest.fixture(scope="module")
def adapters(probe_model: str, tmp_path_factory) -> list[LoRARequest]:
    """Two adapters of random weights, strong enough to change what comes out."""
    config = json.loads((Path(probe_model) / "config.json").read_text())
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    sizes = {
        "q_proj": config["num_attention_heads"] * head_dim,
        "v_proj": config["num_key_value_heads"] * head_dim,
    }
    requests = []
    for number in (1, 2):
        folder = tmp_path_factory.mktemp(f"adapter-{number}")
        generator = torch.Generator().manual_seed(number)
        weights = {}
        for layer in range(config["num_hidden_layers"]):
            for name, size in sizes.items():
                start = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_"
                for part, shape in (("A", (RANK, hidden)), ("B", (size, RANK))):
                    weight = torch.randn(*shape, generator=generator) * 0.1
                    weights[f"{start}{part}.weight"] = weight
        save_file(weights, folder / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK}
        settings |= {"target_modules": list(sizes), "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        requests.append(LoRARequest(f"adapter-{number}", number, str(folder)))
    return requests


@pytest.fixture(scope="module")
def prompt(prompts: list[list[int]]) -> list[int]:
    return prompts[0][:801]


@pytest.fixture(scope="module")
def stock_answers(probe_model: str, prompt: list[int], adapters) -> list[list[int]]:
    """What stock vLLM answers without an adapter, and with each."""
    with opened(probe_model, None, **ARGS) as engine:
        return answers(engine, prompt, [None, *adapters])


@pytest.fixture(scope="module", params=["evict", "draft"])
def engine(request, probe_model: str, stock_answers) -> Iterator[Engine]:
    """One that evicts while decoding, too, and one that drafts; KV events are kept in a list."""
    from vllm.config import KVEventsConfig

    setting = SETTINGS[request.param]
    config = KVEventsConfig(**EVENTS)
    with opened(probe_model, setting, **ARGS, kv_events_config=config) as engine:
        yield engine


@pytest.fixture(autouse=True)
def leaves_nothing_behind(engine: Engine) -> Iterator[None]:
    assert engine.scheduler.reset_prefix_cache()
    yield
    assert_idle(engine)


def add(
    engine: Engine,
    name: str,
    prompt: list[int],
    max_tokens: int = 16,
    xargs: dict[str, Any] | None = None,
    adapter: LoRARequest | None = None,
) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, extra_args=xargs, ignore_eos=True)
    engine.results[name] = Result()
    tokens = {"prompt_token_ids": prompt}
    engine.engine.add_request(name, tokens, params, lora_request=adapter)


def answers(engine: Engine, prompt, adapters, xargs=None) -> list[list[int]]:
    """Answers under several adapters, asked for at once."""
    names = [f"answer-{len(engine.results)}-{index}" for index in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        add(engine, name, prompt, 16, xargs, adapter)
    engine.drain()
    return [engine.results[name].token_ids for name in names]


def is_drafting(engine: Engine) -> bool:
    return engine.scheduler.compression_config.mode == "draft"


def num_changed(engine: Engine) -> int:
    """Compactions and views so far."""
    stats = engine.scheduler.stats
    return sum(stats.compactions.values()) + sum(stats.views.values())


# --- the longest sequence -----------------------------------------------------------------


@pytest.mark.parametrize("preset", [None, "snapkv", "keydiff", "none"])
def test_a_request_ends_at_the_longest_length(engine: Engine, prompt, preset) -> None:
    xargs = {"kv_compression": preset} if preset else None
    before, reason = num_changed(engine), None
    params = SamplingParams(temperature=0, max_tokens=MAX_LEN, extra_args=xargs, ignore_eos=True)
    engine.engine.add_request("long", {"prompt_token_ids": prompt}, params)
    while engine.engine.has_unfinished_requests():
        for output in engine.engine.step():
            tokens, reason = output.outputs[0].token_ids, output.outputs[0].finish_reason
        engine.scheduler.check_integrity()
    assert reason == "length"
    assert len(prompt) + len(tokens) == MAX_LEN
    by_interval = preset is None and not is_drafting(engine)
    expected = {"none": 0}.get(str(preset), 1 + (MAX_LEN - len(prompt)) // 64 * by_interval)
    assert num_changed(engine) == before + expected


# --- LoRA ---------------------------------------------------------------------------------


def test_adapters_give_stocks_tokens(engine: Engine, prompt, adapters, stock_answers) -> None:
    """Where nothing is evicted; drafts over views of an adapter's cache are verified with it."""
    assert len({tuple(tokens) for tokens in stock_answers}) == 3, "the adapters change nothing"
    before = num_changed(engine)
    xargs = None if is_drafting(engine) else {"kv_budget_ratio": 1.0}
    assert answers(engine, prompt, [None, *adapters], xargs) == stock_answers
    assert num_changed(engine) == before + 3 * is_drafting(engine)


def test_adapters_share_no_prefix(engine: Engine, prompt, adapters) -> None:
    cached = []
    for index, adapter in enumerate([None, *adapters, None, *adapters]):
        name = f"prefix-{len(engine.results)}-{index}"
        add(engine, name, prompt, 8, None, adapter)
        engine.drain()
        cached.append(engine.results[name].num_cached_tokens)
    assert cached[:3] == [0, 0, 0]
    assert len(set(cached[3:])) == 1 and cached[3] > 600


def test_adapters_are_compacted_beside_the_model_itself(engine, prompt, adapters) -> None:
    alone = [answers(engine, prompt, [each]) for each in (None, *adapters)]
    assert engine.scheduler.reset_prefix_cache()
    before = num_changed(engine)
    together = answers(engine, prompt, [None, *adapters])
    assert [[tokens] for tokens in together] == alone
    assert num_changed(engine) == before + 3


# --- KV events ----------------------------------------------------------------------------


@pytest.fixture
def events(engine: Engine) -> Iterator[list[Any]]:
    """Events since the prefix cache was emptied."""
    heard: list[Any] = []
    publisher = engine.scheduler.kv_event_publisher
    engine.step()
    engine.scheduler.kv_event_publisher = SimpleNamespace(
        publish=lambda batch: heard.extend(batch.events), shutdown=lambda: None
    )
    engine.pool.take_events()
    yield heard
    engine.scheduler.kv_event_publisher = publisher


def replayed(events: list[Any]) -> set[tuple[int, Any]]:
    """Hashes a listener believes to be in the cache, with their KV cache groups."""
    known: set[tuple[int, Any]] = set()
    for event in events:
        kind = type(event).__name__
        if kind == "AllBlocksCleared":
            known.clear()
            continue
        hashes = {(event.group_idx, each) for each in event.block_hashes}
        assert kind == "BlockStored" or hashes <= known, "removed and never stored"
        known = known | hashes if kind == "BlockStored" else known - hashes
    return known


def in_cache(engine: Engine) -> set[tuple[int, Any]]:
    return {
        (get_group_id(key), maybe_convert_block_hash(get_block_hash(key)))
        for key in engine.pool.cached_block_hash_to_block._cache
    }


def test_events_tell_what_the_cache_holds(engine: Engine, prompts, events) -> None:
    """Also of blocks that a compaction gave back, until they are overwritten."""
    for index, prompt in enumerate(prompts * 2):
        tokens = [3 + (token + index) % 900 for token in prompt[:900]]
        add(engine, f"event-{len(engine.results)}", tokens, 20)
        engine.drain()
        events += engine.pool.take_events()
        assert replayed(events) == in_cache(engine)


def test_no_event_tells_of_blocks_behind_a_compaction(engine: Engine, prompt, events) -> None:
    add(engine, f"event-{len(engine.results)}", prompt, 100)
    engine.drain()
    events += engine.pool.take_events()
    stored = [event for event in events if type(event).__name__ == "BlockStored"]
    last = max(each for event in stored for each in [len(event.token_ids)])
    num_tokens = sum(len(event.token_ids) for event in stored)
    assert last and num_tokens // 32 == (801 + (99 if is_drafting(engine) else 0)) // 32
    assert replayed(events) == in_cache(engine)


# --- pauses -------------------------------------------------------------------------------


def step_until(engine: Engine, name: str, moment: str) -> None:
    """Step a request that was just added to a moment of its life."""
    for _ in range(200):
        engine.step()
        request = engine.live()[name]
        tracked = engine.scheduler.planner.requests[request.request_id]
        is_there = {
            "prefill": 0 < request.num_computed_tokens < request.num_prompt_tokens,
            "commit": tracked.state is State.PLANNED,
            "decode": request.num_output_tokens > 5,
        }[moment]
        if is_there:
            return
    pytest.fail(f"{name} never came to {moment}")


@pytest.fixture
def long_prompt(prompt: list[int]) -> list[int]:
    return (prompt + prompt[::-1])[:900]


def pause_in(engine: Engine, long_prompt, moment: str, state: PauseState) -> tuple[str, str]:
    """Two requests, of which one waits for the other's prompt; the second may come in a pause."""
    first, second = f"pause-{len(engine.results)}-a", f"pause-{len(engine.results)}-b"
    if moment == "prefill":  # another prompt takes part of the step
        add(engine, f"{first}-beside", long_prompt[::-1], 8)
    add(engine, first, long_prompt, 80)
    step_until(engine, first, moment)
    engine.scheduler.set_pause_state(state)
    add(engine, second, long_prompt[1:], 8)
    return first, second


@pytest.mark.parametrize("moment", ["prefill", "commit", "decode"])
def test_a_pause_of_all_changes_no_token(engine: Engine, long_prompt, moment) -> None:
    (expected,) = engine.generate([long_prompt], 80, ignore_eos=True)
    assert engine.scheduler.reset_prefix_cache()
    first, second = pause_in(engine, long_prompt, moment, PauseState.PAUSED_ALL)
    before = len(engine.results[first].token_ids)
    add(engine, "gone", long_prompt[2:], 8)
    engine.abort("gone")  # the engine makes a step for it, without tokens
    for _ in range(4):
        engine.step()
        engine.scheduler.check_integrity()
    assert len(engine.results[first].token_ids) == before
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.drain()
    assert engine.results[first].token_ids == expected
    assert engine.results[second].finished


@pytest.mark.parametrize("moment", ["prefill", "commit", "decode"])
def test_a_pause_of_new_requests_lets_the_others_end(engine: Engine, long_prompt, moment) -> None:
    (expected,) = engine.generate([long_prompt], 80, ignore_eos=True)
    assert engine.scheduler.reset_prefix_cache()
    first, second = pause_in(engine, long_prompt, moment, PauseState.PAUSED_NEW)
    while engine.scheduler.has_unfinished_requests():
        engine.step()
        engine.scheduler.check_integrity()
    assert engine.results[first].token_ids == expected
    assert not engine.results[second].token_ids
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.drain()
    assert len(engine.results[second].token_ids) == 8


@pytest.mark.parametrize("moment", ["prefill", "commit", "decode"])
def test_requests_kept_without_a_cache_start_again(engine: Engine, long_prompt, moment) -> None:
    """``pause_generation(mode="keep")``, and sleep, whose CPU worker keeps its memory."""
    (expected,) = engine.generate([long_prompt], 80, ignore_eos=True)
    assert engine.scheduler.reset_prefix_cache()
    first, second = pause_in(engine, long_prompt, moment, PauseState.UNPAUSED)
    engine.core.sleep(1, mode="keep")
    assert (
        engine.core.is_sleeping() and engine.pool.get_num_free_blocks() == engine.num_usable_blocks
    )
    engine.step()
    engine.scheduler.check_integrity()
    assert engine.core.wake_up()
    engine.drain()
    assert engine.results[first].token_ids == expected
    assert engine.results[second].finished


@pytest.mark.parametrize("moment", ["prefill", "commit", "decode"])
def test_a_pause_that_aborts_frees_everything(engine: Engine, long_prompt, moment) -> None:
    first, _ = pause_in(engine, long_prompt, moment, PauseState.UNPAUSED)
    names = [name for name, result in engine.results.items() if not result.finished]
    engine.core.pause_scheduler("abort", clear_cache=True)
    assert engine.pool.get_num_free_blocks() == engine.num_usable_blocks
    engine.engine.abort_request(names)  # the front end of an engine in this process is not told
    engine.core.resume_scheduler()
    engine.step()
    assert not engine.results[first].finished

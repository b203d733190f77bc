"""Ways to run an engine that compression does not know of: LoRA, KV events, pauses, two ranks."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_utils import (
    get_block_hash,
    get_group_id,
    maybe_convert_block_hash,
)
from vllm.v1.core.sched.interface import PauseState

from tests.e2e.adapters import ENGINE as LORA
from tests.e2e.adapters import merged, two_adapters
from tests.e2e.conftest import assert_idle, opened
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.tracked_request import Phase
from vllm_kvcompress.evaluation.engine import Engine, Result
from vllm_kvcompress.evaluation.replay import Replay

pytestmark = pytest.mark.engine
both = pytest.mark.parametrize("engine", ["evict", "draft"], indirect=True)
with_adapters = pytest.mark.parametrize("engine", ["evict lora"], indirect=True)

MAX_LEN = 1024
SETTING = {"preset": "snapkv", "budget": {"ratio": 0.25}, "min_prompt_len": 128}
INTERVAL = 32
SETTINGS = {
    "evict": {**SETTING, "trigger": "both", "interval": INTERVAL, "observation_window": 32},
    "draft": {**SETTING, "mode": "draft", "draft": {"tokens": 3}},
}
BLOCKS = 80
"""Of 32 tokens: two requests of the longest length and a little more."""
ARGS = {"max_model_len": MAX_LEN, "num_blocks": 1 + BLOCKS}
EVENTS = {"enable_kv_cache_events": True, "publisher": "null"}


@pytest.fixture(scope="module")
def adapters(probe_model: str, tmp_path_factory) -> list[LoRARequest]:
    return two_adapters(probe_model, tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def prompt(prompts: list[list[int]]) -> list[int]:
    return prompts[0][:901]


@pytest.fixture(scope="module")
def stock_answers(probe_model: str, prompt: list[int], adapters) -> list[list[int]]:
    """What stock vLLM answers with each adapter."""
    with opened(probe_model, None, **ARGS, **LORA) as engine:
        return answers(engine, prompt, adapters)


@pytest.fixture(scope="module")
def engine(request, probe_model: str) -> Iterator[Engine]:
    """One that evicts while decoding, too, or one that drafts."""
    from vllm.config import KVEventsConfig

    name, _, lora = request.param.partition(" ")
    if lora:
        request.getfixturevalue("stock_answers")  # one engine at a time
    config = KVEventsConfig(**EVENTS)
    lora_args = LORA if lora else {}
    with opened(
        probe_model, SETTINGS[name], **ARGS, **lora_args, kv_events_config=config
    ) as engine:
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
    return engine.scheduler.planner.config.mode == "draft"


def num_changed(engine: Engine) -> int:
    """Compactions and views so far."""
    stats = engine.scheduler.stats
    return sum(stats.compactions.values()) + sum(stats.views.values())


# --- the longest sequence -----------------------------------------------------------------


@both
@pytest.mark.parametrize("preset", [None, "keydiff", "none"])
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
    expected = {"none": 0}.get(str(preset), 1 + (MAX_LEN - len(prompt)) // INTERVAL * by_interval)
    assert num_changed(engine) == before + expected


# --- LoRA ---------------------------------------------------------------------------------


@with_adapters
def test_adapters_give_stocks_tokens(engine: Engine, prompt, adapters, stock_answers) -> None:
    """Where nothing is evicted; drafts over views of an adapter's cache are verified with it."""
    assert stock_answers[0] != stock_answers[1], "the adapters change nothing"
    before = num_changed(engine)
    xargs = None if is_drafting(engine) else {"kv_budget_ratio": 1.0}
    assert answers(engine, prompt, adapters, xargs) == stock_answers
    assert num_changed(engine) == before + 2 * is_drafting(engine)


@with_adapters
def test_adapters_share_no_prefix(engine: Engine, prompt, adapters) -> None:
    cached = []
    for adapter in [None, adapters[0], None, adapters[0]]:
        name = f"prefix-{len(engine.results)}"
        add(engine, name, prompt, 4, None, adapter)
        engine.drain()
        cached.append(engine.results[name].num_cached_tokens)
    assert cached[:2] == [0, 0]
    assert cached[2] == cached[3] > 700


@with_adapters
def test_compacted_adapters_give_the_tokens_of_merged_weights(
    engine: Engine, probe_model: str, prompt, adapters, tmp_path: Path
) -> None:
    """On transformers, over the same survivors; both adapters in one batch."""
    expected, config = [], parse_config(SETTINGS["evict"])
    for adapter in adapters:
        replay = Replay(merged(probe_model, adapter, tmp_path / adapter.lora_name))
        expected.append(replay.generate(replay.prefill(prompt), config, 16))
    before = num_changed(engine)
    assert answers(engine, prompt, adapters) == expected
    assert num_changed(engine) == before + 2


@with_adapters
def test_adapters_are_compacted_beside_the_model_itself(engine: Engine, prompt, adapters) -> None:
    """Stock's answers without an adapter beside one are not looked at: on CPU they are wrong."""
    alone = [answers(engine, prompt, [adapter])[0] for adapter in adapters]
    assert engine.scheduler.reset_prefix_cache()
    before = num_changed(engine)
    assert answers(engine, prompt[:600], [None, *adapters])
    assert num_changed(engine) == before + 3
    assert answers(engine, prompt, adapters) == alone


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


@both
def test_events_tell_what_the_cache_holds(engine: Engine, prompts, events) -> None:
    """Also of blocks that a compaction gave back, until others are written there."""
    for number, prompt in enumerate(prompts[:5]):
        tokens = [3 + (token + number) % 900 for token in prompt[:900]]
        add(engine, f"event-{len(engine.results)}", tokens, 8)
        engine.drain()
        events += engine.pool.take_events()
        assert replayed(events) == in_cache(engine)
    assert any(type(event).__name__ == "BlockRemoved" for event in events)


@both
def test_no_event_tells_of_blocks_behind_a_compaction(engine: Engine, prompt, events) -> None:
    """What is computed over an evicted past must not be found by its tokens."""
    add(engine, f"event-{len(engine.results)}", prompt, 70)
    engine.drain()
    events += engine.pool.take_events()
    stored = sum(len(e.token_ids) for e in events if type(e).__name__ == "BlockStored")
    length = len(prompt) + (69 if is_drafting(engine) else 0)
    assert stored == length // 32 * 32
    assert replayed(events) == in_cache(engine)


# --- pauses -------------------------------------------------------------------------------

NUM_TOKENS = 40
MOMENTS = ["prefill", "commit", "decode"]


def step_until(engine: Engine, name: str, moment: str) -> None:
    """Step a request that was just added to a moment of its life."""
    for _ in range(200):
        engine.step()
        request = engine.live()[name]
        tracked = engine.scheduler.planner.requests[request.request_id]
        is_there = {
            "prefill": 0 < request.num_computed_tokens < request.num_prompt_tokens,
            "commit": tracked.phase is Phase.PLANNED,
            "decode": request.num_output_tokens > 5,
        }[moment]
        if is_there:
            return
    pytest.fail(f"{name} never came to {moment}")


@pytest.fixture(scope="module")
def expected(engine: Engine, prompt: list[int]) -> list[int]:
    """The answer without a pause."""
    return engine.generate([prompt], NUM_TOKENS, ignore_eos=True)[0]


def pause_in(engine: Engine, prompt, moment: str, state: PauseState) -> tuple[str, str]:
    """Add a request, pause at a moment of its life, and add another. The names of both."""
    first, second = f"pause-{len(engine.results)}-a", f"pause-{len(engine.results)}-b"
    if moment == "prefill":  # another prompt takes part of the step
        add(engine, f"{first}-beside", prompt[:400:-1], 4)
    add(engine, first, prompt, NUM_TOKENS)
    step_until(engine, first, moment)
    engine.scheduler.set_pause_state(state)
    add(engine, second, prompt[1:], 8)
    return first, second


@both
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_pause_of_all_changes_no_token(engine: Engine, prompt, expected, moment) -> None:
    first, second = pause_in(engine, prompt, moment, PauseState.PAUSED_ALL)
    before = len(engine.results[first].token_ids)
    add(engine, "gone", prompt[2:], 8)
    engine.abort("gone")  # the engine makes a step for it, without tokens
    for _ in range(4):
        engine.step()
        engine.scheduler.check_integrity()
    assert len(engine.results[first].token_ids) == before
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.drain()
    assert engine.results[first].token_ids == expected
    assert engine.results[second].finished


@both
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_pause_of_new_requests_lets_the_others_end(
    engine: Engine, prompt, expected, moment
) -> None:
    first, second = pause_in(engine, prompt, moment, PauseState.PAUSED_NEW)
    while engine.scheduler.has_unfinished_requests():
        engine.step()
        engine.scheduler.check_integrity()
    assert engine.results[first].token_ids == expected
    assert not engine.results[second].token_ids
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.drain()
    assert len(engine.results[second].token_ids) == 8


@both
@pytest.mark.parametrize("moment", MOMENTS)
def test_requests_kept_without_a_cache_start_again(
    engine: Engine, prompt, expected, moment
) -> None:
    """``pause_generation(mode="keep")``, and sleep, whose CPU worker keeps its memory."""
    first, second = pause_in(engine, prompt, moment, PauseState.UNPAUSED)
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


@both
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_pause_that_aborts_frees_everything(engine: Engine, prompt, moment) -> None:
    first, _ = pause_in(engine, prompt, moment, PauseState.UNPAUSED)
    names = [name for name, result in engine.results.items() if not result.finished]
    engine.core.pause_scheduler("abort", clear_cache=True)
    assert engine.pool.get_num_free_blocks() == engine.num_usable_blocks
    engine.engine.abort_request(names)  # the front end of an engine in this process is not told
    engine.core.resume_scheduler()
    engine.step()
    assert not engine.results[first].finished

"""EAGLE and MTP heads, and pipeline stages, over a cache that evicts: the tokens of none of them.

Three engines of one target, one after the other, say the same. What they must say comes from the
first of them, while its drafts are thrown away, and from transformers over the same survivors.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from lab.random_models import distinct_tokens
from tests.e2e.conftest import assert_idle, opened
from tests.e2e.random_heads import write_target_with_eagle, write_target_with_mtp
from tests.e2e.turns import Conversation
from tests.inside import managers, preempt
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.request_options import parse_request, resolve_request

pytestmark = pytest.mark.engine

BLOCK, INTERVAL, NUM_TOKENS, NUM_DRAFTS = 32, 16, 52, 3
SETTING: dict[str, Any] = {
    "preset": "snapkv",
    "observation_window": 8,
    "budget": {"tokens": 96, "floor": 1},
    "layer_groups": {"count": 2},
    "trigger": "both",
    "interval": INTERVAL,
    "min_prompt_len": 0,
}
ENGINE: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 2048,
    "max_num_batched_tokens": 256,  # prompts come in chunks
}
REQUESTS: list[tuple[list[int], dict[str, Any] | None]] = [
    (distinct_tokens(500, 0), None),
    (distinct_tokens(110, 1), None),  # compacted only while it decodes
    (distinct_tokens(300, 2), {"kv_compression": "none"}),
]
COMPACTIONS = [(0, 500), (0, 516), (0, 548), (1, 142)]
"""Requests, and their lengths when they are compacted."""

Tokens = list[list[int]]


@dataclass
class Said:
    """What an engine did.

    Attributes
    ----------
    tokens, after_preemption : list[list[int]]
        Of all requests, and again with the first preempted after two compactions.
    after_hit : list[int]
        Of the first again.
    num_cached : int or None
        Tokens that this one found in the prefix cache.
    compactions : list[tuple[int, int]]
        On the way to `tokens`, sorted.
    steps : dict[int, int]
        Engine steps in which a request yielded tokens, likewise.
    """

    tokens: Tokens
    after_preemption: Tokens
    after_hit: list[int]
    num_cached: int | None
    compactions: list[tuple[int, int]]
    steps: dict[int, int] = field(default_factory=dict)


def add_all(engine: Engine, requests: Any = REQUESTS) -> list[str]:
    names = [f"{len(engine.results)}-{number}" for number in range(len(requests))]
    for name, (prompt, xargs) in zip(names, requests, strict=True):
        engine.add(name, prompt, NUM_TOKENS, xargs, ignore_eos=True)
    return names


def step(engine: Engine) -> None:
    engine.step()
    engine.scheduler.check_integrity()


@contextmanager
def watching(engine: Engine) -> Iterator[list[tuple[int, int]]]:
    """The compactions that are planned meanwhile."""
    compactions, found = engine.scheduler.compactions, []

    def plan(due: Any) -> Any:
        plans = planned(due)
        found.extend((int(p.request_id.split("-")[1]), p.position) for p in plans)
        return plans

    planned = compactions.plan
    with patch.object(compactions, "plan", plan):
        yield found


def run_all(engine: Engine) -> tuple[Tokens, list[tuple[int, int]], dict[int, int]]:
    names, steps = add_all(engine), defaultdict(int)
    with watching(engine) as compactions:
        while engine.engine.has_unfinished_requests():
            before = [len(engine.results[name].token_ids) for name in names]
            step(engine)
            for number, name in enumerate(names):
                steps[number] += len(engine.results[name].token_ids) > before[number]
    return [engine.results[name].token_ids for name in names], sorted(compactions), steps


def listen(engine: Engine) -> Said:
    """Run the requests, the first again, and all again with trouble."""
    tokens, compactions, steps = run_all(engine)
    (again,) = add_all(engine, REQUESTS[:1])
    engine.drain()
    result = engine.results[again]
    assert engine.scheduler.reset_prefix_cache()
    after = with_trouble(engine)
    assert engine.pool.get_num_free_blocks() == engine.num_usable_blocks
    return Said(tokens, after, result.token_ids, result.num_cached_tokens, compactions, steps)


def with_trouble(engine: Engine) -> Tokens:
    """The first request is preempted after a compaction while decoding, a stranger is aborted."""
    names = add_all(engine)
    engine.add("stranger", distinct_tokens(400, 7), NUM_TOKENS, ignore_eos=True)
    trouble = set()
    while engine.engine.has_unfinished_requests():
        step(engine)
        live = engine.live()
        first, stranger = live.get(names[0]), live.get("stranger")
        if first and first.num_output_tokens > INTERVAL and "preempted" not in trouble:
            preempt(engine, first)
            trouble.add("preempted")
        if stranger and engine.scheduler.compactions.is_planned(stranger.request_id):
            engine.abort("stranger")
            trouble.add("aborted")
    assert trouble == {"preempted", "aborted"}
    return [engine.results[name].token_ids for name in names]


# --- engines ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("heads")
    target, eagle = write_target_with_eagle(folder)
    return {"target": target, "eagle": eagle, "mtp": write_target_with_mtp(folder)}


@pytest.fixture(scope="module")
def eagle_engine(models: dict[str, str]) -> Iterator[dict[str, Any]]:
    """What the engine with the EAGLE head says with its drafts, and without."""
    head = {"method": "eagle", "model": models["eagle"], "num_speculative_tokens": NUM_DRAFTS}
    with opened(models["target"], SETTING, speculative_config=head, **ENGINE) as engine:
        groups = [manager.kv_cache_spec.layer_group for manager in managers(engine)]
        said = listen(engine)
        assert_idle(engine)
        assert engine.scheduler.reset_prefix_cache()
        with patch.object(engine.scheduler, "update_draft_token_ids", lambda drafts: None):
            plain = run_all(engine)
        assert_idle(engine)
    return {"said": said, "plain": plain, "groups": groups}


@pytest.fixture(scope="module")
def expected(eagle_engine: dict[str, Any]) -> Tokens:
    tokens, compactions, steps = eagle_engine["plain"]
    assert compactions == COMPACTIONS
    assert set(steps.values()) == {NUM_TOKENS}, "no draft was verified"
    return tokens


def assert_equal(said: Said, expected: Tokens, num_cached: int) -> None:
    assert said.tokens == expected
    assert said.compactions == COMPACTIONS
    assert said.after_preemption == expected
    assert (said.after_hit, said.num_cached) == (expected[0], num_cached)


HIT = (500 - 8) // BLOCK * BLOCK
"""All but the observation window, in whole blocks. Beside a head vLLM takes one block less."""


# --- tests --------------------------------------------------------------------------------


def test_the_tokens_are_those_of_transformers(models: dict[str, str], expected: Tokens) -> None:
    """Up to the first compaction while decoding, which it does not know."""
    replay, config = Replay(models["target"], BLOCK), parse_config(SETTING)
    for (prompt, xargs), tokens in zip(REQUESTS, expected, strict=True):
        count = NUM_TOKENS if xargs else INTERVAL
        whole = replay.generate(replay.prefill(prompt), None, count)
        own = replay.generate(replay.prefill(prompt), None if xargs else config, count)
        assert tokens[:count] == own
        assert (own == whole) == (len(prompt) < 500), "the long one has lost tokens"


def test_eagle_drafts_give_the_same_tokens(eagle_engine, expected: Tokens) -> None:
    assert_equal(eagle_engine["said"], expected, HIT - BLOCK)
    assert eagle_engine["groups"] == [0, 1, None, None]


def test_the_heads_cache_is_right_beside_compactions(eagle_engine) -> None:
    """Over a whole cache the head is the target but for the first token."""
    steps = eagle_engine["said"].steps
    assert steps[2] < NUM_TOKENS / 2
    assert min(steps[0], steps[1]) < NUM_TOKENS, "some are accepted over a compacted cache"


def test_mtp_drafts_give_the_same_tokens(models: dict[str, str], expected: Tokens) -> None:
    head = {"method": "mtp", "num_speculative_tokens": NUM_DRAFTS}
    with opened(models["mtp"], SETTING, speculative_config=head, **ENGINE) as engine:
        # One layer drafts, so vLLM makes groups of one layer.
        groups = [manager.kv_cache_spec.layer_group for manager in managers(engine)]
        assert groups == [0, 0, 1, 1, None]
        said = listen(engine)
        assert_idle(engine)
    assert_equal(said, expected, HIT - BLOCK)


def own_layers(worker: Any) -> list[int]:
    """In a rank: the layers that it compacts."""
    return [layer.index for layer in worker.model_runner.compactor.layers]


def evicted(worker: Any) -> list[list[int]]:
    """In a rank: what its requests have lost, by KV cache group."""
    return worker.model_runner.model_state.lengths.evicted.np.tolist()


def check_readers(engine: Engine, model: str) -> None:
    """A text that is shared, a chat and samples of one prompt say what transformers say over the
    same survivors."""
    replay, server, text = Replay(model, BLOCK), parse_config(SETTING), distinct_tokens(600, 5)
    stats, preset = engine.scheduler.stats, {"kv_compression": "shared_prefix"}

    def ask(prompts: list[list[int]], **xargs: Any) -> Tokens:
        return engine.generate(prompts, 12, {**preset, **xargs}, ignore_eos=True)

    def reference(**xargs: Any) -> Conversation:
        return Conversation(replay, resolve_request(server, parse_request({**preset, **xargs})))

    prefix = reference(kv_shared_prefix=600)
    prefix.say(text[: 600 // BLOCK * BLOCK], 1)
    questions = [[*text, *distinct_tokens(20 + n, 30 + n)] for n in range(3)]
    assert ask(questions, kv_shared_prefix=600) == [prefix.go_on(each, 12) for each in questions]
    assert stats.shared_prefix_requests == {"computed": 1, "reused": 2}

    chat, turn = reference(kv_session="chat"), text
    for number in range(2):
        (said,) = ask([turn], kv_session="chat")
        assert said == chat.say(turn, 12), number
        turn = [*turn, *said, *distinct_tokens(40, 50 + number)]
    assert stats.session_requests == {"nothing_kept": 1, "reused": 1}

    taken = sum(stats.blocks_taken.values())
    found = ask([text] * 3, kv_compression="snapkv")
    own = resolve_request(server, parse_request({"kv_compression": "snapkv"}))
    assert found == [replay.generate(replay.prefill(text), own, 12)] * 3
    assert found[0] != replay.generate(replay.prefill(text), None, 12)
    most = 600 // BLOCK  # of one copy, in two groups
    assert 0 < sum(stats.blocks_taken.values()) - taken < most
    assert engine.scheduler.reset_prefix_cache()


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two stages need two cores")
def test_two_pipeline_stages_give_the_same_tokens(
    models: dict[str, str], expected: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With asynchronous scheduling, as on a GPU: three steps are in flight."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = {**ENGINE, "pipeline_parallel_size": 2, "async_scheduling": True}
    with opened(models["target"], SETTING, **options) as engine:
        assert engine.core.batch_queue_size == 3
        workers = engine.core.model_executor
        assert workers.collective_rpc(own_layers) == [[0, 1], [2, 3]]
        said = listen(engine)

        engine.add("lost", REQUESTS[0][0], NUM_TOKENS, ignore_eos=True)
        while len(engine.results["lost"].token_ids) < 4:
            step(engine)
        first, second = workers.collective_rpc(evicted)
        assert first == second and any(map(any, first))
        engine.drain()
        assert engine.scheduler.stats.compactions["snapkv/prompt"] == 5
        assert engine.scheduler.stats.seconds, "the last stage's times arrive"
        check_readers(engine, models["target"])
    assert_equal(said, expected, HIT)

"""Many questions over one text that is compressed once, in a real engine, beside transformers."""

from collections import Counter
from collections.abc import Iterator

import pytest

from lab.random_models import distinct_tokens
from tests.e2e.conftest import assert_idle, opened
from tests.e2e.turns import Conversation
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.lengths.budgets import evicting_marks
from vllm_kvcompress.request_options import parse_request, resolve_request

pytestmark = pytest.mark.engine

SETTING = {
    "preset": "shared_prefix",
    "layer_groups": {"size": 1},
    "trigger": "all",
    "interval": 16,
    "prompt_interval": 200,
}
"""A request that names no preset has marks inside its prefix, which are not those of chunks."""
NUM_TOKENS, BLOCK = 12, 32
KINDS = {
    "default": {},
    "half": {"kv_budget_ratio": 0.5},
    "knorm": {"kv_compression": "knorm", "kv_budget_ratio": 0.25},
    "streaming_llm": {"kv_compression": "streaming_llm", "kv_budget_tokens": 200},
    "lagkv": {"kv_compression": "lagkv", "kv_budget_ratio": 0.3},
    "pinned": {"kv_budget_ratio": 0.25, "kv_pin": [100, 140]},
}
LENGTHS = (1, 30, 300)
"""Tokens of the questions; more than a step computes."""


@pytest.fixture(scope="module")
def engine(probe_model: str) -> Iterator[Engine]:
    with opened(probe_model, SETTING, async_scheduling=True, max_num_batched_tokens=256) as found:
        yield found


@pytest.fixture(scope="module")
def replay(probe_model: str) -> Replay:
    return Replay(probe_model)


def settle(engine: Engine) -> None:
    """Give back all that is kept for others; nothing else is held."""
    assert engine.scheduler.reset_prefix_cache()
    assert_idle(engine)


def test_every_answer_is_the_references_alone_and_in_a_crowd(
    engine: Engine, replay: Replay, prompts: list[list[int]]
) -> None:
    server, stats = parse_config(SETTING), engine.scheduler.stats
    texts = {kind: prompts[n][: 640 + 37 * n] for n, kind in enumerate(KINDS)}
    expected: dict[str, list[int]] = {}
    asked: dict[str, list[int]] = {}
    compactions, whole = Counter[str](), 0
    for kind, xargs in KINDS.items():
        options = parse_request({**xargs, "kv_shared_prefix": len(texts[kind])})
        shared_len = options.shared_len(BLOCK)
        reference = Conversation(replay, resolve_request(server, options))
        reference.say(texts[kind][:shared_len], 1)
        config = resolve_request(server, options)
        marks = evicting_marks(shared_len, config, 4, BLOCK)
        assert (len(marks) > 1) == ("kv_compression" not in xargs), "marks inside the prefix"
        compactions[f"{config.policy.name}/prompt"] += len(marks)
        for number, length in enumerate(LENGTHS):
            name = f"{kind}-{number}"
            asked[name] = [*texts[kind], *distinct_tokens(length, seed=number)]
            expected[name] = reference.go_on(asked[name], NUM_TOKENS)
        whole += replay.generate(replay.prefill(asked[name]), None, NUM_TOKENS) != expected[name]
    assert whole >= 2, "it shows in tokens what was evicted"

    def ask(name: str, suffix: str) -> None:
        kind = name.split("-")[0]
        xargs = {**KINDS[kind], "kv_shared_prefix": len(texts[kind])}
        engine.add(f"{name}.{suffix}", asked[name], NUM_TOKENS, xargs, ignore_eos=True)

    for name in asked:
        ask(name, "crowd")
    engine.drain()
    engine.scheduler.check_integrity()
    assert {n: engine.results[f"{n}.crowd"].token_ids for n in asked} == expected
    assert stats.shared_prefix_requests == {"computed": len(KINDS), "reused": 2 * len(KINDS)}
    assert stats.compactions == compactions
    for name in asked:  # from what is kept
        ask(name, "later")
        engine.drain()
    assert {n: engine.results[f"{n}.later"].token_ids for n in asked} == expected
    cached = [engine.results[f"{n}.later"].num_cached_tokens for n in asked]
    assert cached == [len(texts[n.split("-")[0]]) // BLOCK * BLOCK for n in asked]
    assert stats.shared_prefix_requests["computed"] == len(KINDS)
    firsts = [name for name in asked if name.endswith("-1")]
    for name in firsts:  # and some for themselves
        settle(engine)
        ask(name, "alone")
        engine.drain()
    assert all(engine.results[f"{n}.alone"].token_ids == expected[n] for n in firsts)
    settle(engine)


def test_a_prefix_that_is_kept_whole_gives_stocks_tokens(
    engine: Engine, replay: Replay, prompts: list[list[int]]
) -> None:
    xargs = {"kv_shared_prefix": 600, "kv_budget_ratio": 1.0}
    text = [*prompts[0][:600], *distinct_tokens(30, seed=3)]
    found = engine.generate([text], NUM_TOKENS, xargs, ignore_eos=True)
    assert found == [replay.generate(replay.prefill(text), None, NUM_TOKENS)]
    assert engine.scheduler.stats.uncompressed["under_budget"] == 1
    settle(engine)


def test_a_small_pool_changes_who_waits_and_no_token(
    engine: Engine, replay: Replay, prompts: list[list[int]]
) -> None:
    """Readers are preempted and prefixes given back; the rest of the pool is somebody else's."""
    server = parse_config(SETTING)
    asked, expected = {}, {}
    for document in range(3):
        text = prompts[document][:640]
        options = parse_request({"kv_shared_prefix": 640})
        reference = Conversation(replay, resolve_request(server, options))
        reference.say(text, 1)
        for number in range(3):
            prompt = [*text, *distinct_tokens(40, seed=10 * document + number)]
            asked[f"d{document}-{number}"] = prompt
            expected[f"d{document}-{number}"] = reference.go_on(prompt, 40)
    before, num_groups = engine.num_preemptions, 4
    num_free = engine.pool.get_num_free_blocks() - 38 * num_groups
    taken = engine.pool.get_new_blocks(num_free)
    for name, prompt in asked.items():
        engine.add(name, prompt, 40, {"kv_shared_prefix": 640}, ignore_eos=True)
    engine.drain()
    engine.scheduler.check_integrity()
    engine.pool.free_blocks(taken)
    assert {name: engine.results[name].token_ids for name in asked} == expected
    assert engine.num_preemptions >= before
    settle(engine)

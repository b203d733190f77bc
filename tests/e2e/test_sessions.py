"""The next turn of a chat, in a real engine that schedules ahead, beside transformers.

Chats under several policies run together: a step computes turns that continue, prompts from
nothing, and answers.
"""

from collections.abc import Iterator

import pytest

from lab.random_models import distinct_tokens
from tests.e2e.conftest import assert_idle, opened
from tests.e2e.turns import Conversation
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.request_options import parse_request, resolve_request

pytestmark = pytest.mark.engine

SETTING = {"preset": "snapkv", "layer_groups": {"size": 1}, "observation_window": 16}
CHATS = {
    "snapkv": {"kv_compression": "snapkv", "kv_budget_ratio": 0.25},
    "pyramidkv": {"kv_compression": "pyramidkv", "kv_budget_ratio": 0.3},
    "windowkv": {"kv_compression": "windowkv", "kv_budget_ratio": 0.25, "kv_task": "localization"},
    "keydiff": {"kv_compression": "keydiff", "kv_budget_tokens": 160},
    "criticalkv": {"kv_compression": "criticalkv", "kv_budget_ratio": 0.2},
    "pinned": {"kv_compression": "knorm", "kv_budget_ratio": 0.25, "kv_pin": [100, 140]},
}
NUM_TOKENS = 12
NEW = (83, 200, 41)
"""Tokens that the user adds in each later turn."""


@pytest.fixture(scope="module")
def engine(probe_model: str) -> Iterator[Engine]:
    with opened(probe_model, SETTING, async_scheduling=True, max_num_batched_tokens=256) as found:
        yield found


@pytest.fixture(scope="module")
def replay(probe_model: str) -> Replay:
    return Replay(probe_model)


def settle(engine: Engine) -> None:
    """Give back all that waits for a next turn; nothing else is held."""
    assert engine.scheduler.reset_prefix_cache()
    assert_idle(engine)


def test_a_turn_says_what_a_reference_says_over_the_same_survivors(
    engine: Engine, replay: Replay, prompts: list[list[int]]
) -> None:
    texts = {name: prompts[n][: 700 + 37 * n] for n, name in enumerate(CHATS)}
    server = parse_config(SETTING)
    chats = {
        name: Conversation(replay, resolve_request(server, parse_request(xargs), "localization"))
        for name, xargs in CHATS.items()
    }
    reused, compactions = 0, []
    for turn in range(1 + len(NEW)):
        for name, text in texts.items():
            xargs = {**CHATS[name], "kv_session": name}
            engine.add(f"{name} {turn}", text, NUM_TOKENS, xargs, ignore_eos=True)
        engine.drain()
        engine.scheduler.check_integrity()
        for number, (name, text) in enumerate(texts.items()):
            found, expected = engine.results[f"{name} {turn}"], chats[name].say(text, NUM_TOKENS)
            assert found.token_ids == expected, (name, turn)
            if turn:
                assert found.num_cached_tokens == chats[name].num_reused[-1], (name, turn)
                reused += found.num_cached_tokens
            if turn < len(NEW):
                more = distinct_tokens(NEW[turn], seed=10 * turn + number)
                texts[name] = [*text, *found.token_ids, *more]
        compactions.append(sum(engine.scheduler.stats.compactions.values()))
    # It shows in tokens: compressed anew, or not at all, some chats would have said other things.
    for config in (lambda name: chats[name].config, lambda name: None):
        prefilled = {name: replay.prefill(text) for name, text in texts.items()}
        other = {name: replay.generate(prefilled[name], config(name), NUM_TOKENS) for name in texts}
        last = {name: engine.results[f"{name} {len(NEW)}"].token_ids for name in texts}
        assert sum(other[name] != last[name] for name in texts) >= 2
    stats = engine.scheduler.stats
    assert stats.session_requests == {"nothing_kept": 6, "reused": 18}
    assert stats.session_tokens == reused
    assert compactions == [6, 12, 18, 24], "every turn's end is compacted"
    settle(engine)


def test_without_eviction_the_tokens_are_stocks(
    engine: Engine, replay: Replay, prompts: list[list[int]]
) -> None:
    text, kept = prompts[0][:600], engine.scheduler.stats.sessions_kept
    for turn in range(2):
        xargs = {"kv_session": "whole", "kv_budget_ratio": 1.0}
        (found,) = engine.generate([text], NUM_TOKENS, xargs, ignore_eos=True)
        assert found == replay.generate(replay.prefill(text), None, NUM_TOKENS), turn
        text = [*text, *found, *distinct_tokens(50, seed=turn)]
    assert engine.scheduler.stats.sessions_kept == kept
    settle(engine)


def test_what_is_kept_gives_way_and_the_turn_is_computed(
    engine: Engine, replay: Replay, prompts: list[list[int]]
) -> None:
    """A prompt that needs the whole pool takes it; the chat's next turn starts from nothing."""
    xargs = {"kv_session": "chat", "kv_budget_ratio": 0.25}
    config = resolve_request(parse_config(SETTING), parse_request(xargs))
    (answer,) = engine.generate([prompts[1][:700]], NUM_TOKENS, xargs, ignore_eos=True)
    taken = engine.pool.get_new_blocks(engine.pool.get_num_free_blocks() - 4 * 30)
    engine.generate([distinct_tokens(1000, seed=5)], 4, {"kv_compression": "none"})
    assert engine.scheduler.stats.sessions_given_back["room"] >= 1
    engine.pool.free_blocks(taken)
    text = [*prompts[1][:700], *answer, *distinct_tokens(60, seed=6)]
    (found,) = engine.generate([text], NUM_TOKENS, xargs, ignore_eos=True)
    assert found == replay.generate(replay.prefill(text), config, NUM_TOKENS)
    settle(engine)

"""The trigger "pressure" in a real engine: stock's tokens in ample memory, the reference's else."""

from collections.abc import Iterator
from typing import Any

import pytest

from lab.scenarios import churn
from tests.e2e.conftest import assert_idle, opened
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.messages import StepPlan

pytestmark = pytest.mark.engine

SETTING = {
    "preset": "snapkv",
    "policy": {"kernel_size": 13},
    "trigger": "pressure",
    "budget": {"tokens": 200, "floor": 1},
    "interval": 512,
    "min_prompt_len": 128,
}
POOL = 130
"""Blocks of 32 tokens: two prompts of ~1,500 tokens, and not three."""
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def engine(probe_model: str) -> Iterator[Engine]:
    with opened(
        probe_model, SETTING, num_blocks=1 + POOL, max_model_len=2560, async_scheduling=True
    ) as engine:
        assert engine.core.batch_queue is not None
        yield engine


Run = tuple[dict[str, list[int]], dict[str, list[int]]]


def run(engine: Engine, prompts: list[list[int]]) -> Run:
    """All prompts at once: tokens by name, and the lengths at which each was compacted."""
    assert engine.scheduler.reset_prefix_cache()
    compacted: dict[str, list[int]] = {}
    schedule = engine.scheduler.schedule

    def watched(*args: Any) -> Any:
        output = schedule(*args)
        for plan in StepPlan.of(output).plans:
            compacted.setdefault(plan.request_id.rsplit("-", 1)[0], []).append(plan.position)
        return output

    engine.scheduler.schedule = watched
    names = [f"p{number}" for number in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        engine.add(name, prompt, NUM_TOKENS, ignore_eos=True)
    while engine.engine.has_unfinished_requests():
        engine.step()
        engine.scheduler.check_integrity()
    engine.scheduler.schedule = schedule
    assert_idle(engine)
    return {name: engine.results[name].token_ids for name in names}, compacted


@pytest.fixture(scope="module")
def small(engine: Engine, prompts: list[list[int]]) -> Run:
    return run(engine, prompts)


def test_with_memory_to_spare_every_token_is_stocks(
    engine: Engine, prompts: list[list[int]], stock_tokens: list[list[int]]
) -> None:
    """One after the other: each holds a third of the pool. Nobody records queries."""
    stats, state = engine.scheduler.stats, engine.runner.model_state
    before = dict(stats.uncompressed), dict(stats.compactions)
    found = []
    for prompt in prompts:
        engine.add("alone", prompt, 16, ignore_eos=True)
        while engine.engine.has_unfinished_requests():
            engine.step()
            assert not state.awaits_queries and not engine.scheduler.query_slots.owned
        found.append(engine.results["alone"].token_ids)
    assert found == stock_tokens
    assert stats.compactions == before[1]
    more = stats.uncompressed["ample_memory"] - before[0].get("ample_memory", 0)
    assert more == len(prompts)
    assert_idle(engine)


def test_a_crowd_is_compressed_as_the_reference_does(
    engine: Engine, small: Run, prompts: list[list[int]], probe_model: str
) -> None:
    """At the end of a prompt, or in the middle of a generation, and the others not at all."""
    tokens, compacted = small
    replay, config = Replay(probe_model), parse_config({**SETTING, "trigger": "end_of_prompt"})
    lengths = {f"p{number}": len(prompt) for number, prompt in enumerate(prompts)}
    while_decoding = 0
    for number, (name, said) in enumerate(tokens.items()):
        positions = compacted.get(name, [])
        if not positions:
            assert said == replay.generate(replay.prefill(prompts[number]), None, NUM_TOKENS), name
            continue
        assert len(positions) == 1, "an interval is longer than the output"
        count = positions[0] - lengths[name]
        while_decoding += count > 0
        held = replay.prefill(prompts[number] + said[:count])
        assert said[count:] == replay.generate(held, config, NUM_TOKENS - count), name
    assert while_decoding > 0 and len(compacted) - while_decoding > 3
    stats = engine.scheduler.stats
    assert stats.deferrals == 0 and engine.num_preemptions == 0
    assert stats.compactions["snapkv/decode"] >= while_decoding


def test_the_same_crowd_says_the_same_again(
    engine: Engine, small: Run, prompts: list[list[int]]
) -> None:
    assert run(engine, prompts) == small


def test_churn_leaves_nothing_behind(engine: Engine) -> None:
    report = churn(engine, 24, seed=5)
    assert (report.blocks_missing, report.evicted_left) == (0, 0)
    assert report.finished > 3 and report.aborted_in_decode > 0
    assert_idle(engine)

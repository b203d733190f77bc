"""Requests that share blocks say alone and in a crowd the same: `shared_blocks: always`."""

from collections.abc import Iterator
from typing import Any

import pytest

from lab.random_models import distinct_tokens
from tests.e2e.conftest import assert_idle, opened
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.messages import StepPlan
from vllm_kvcompress.plans import Purpose

pytestmark = pytest.mark.engine

SETTING = {
    "preset": "snapkv",
    "trigger": "both",
    "interval": 32,
    "budget": {"tokens": 192, "floor": 1},
    "min_prompt_len": 128,
    "shared_blocks": "always",
}
PREFIX = distinct_tokens(640, seed=1)
PROMPTS = {
    **{f"question {n}": PREFIX + distinct_tokens(40 + n, seed=10 + n) for n in range(3)},
    "same": PREFIX + distinct_tokens(100, seed=2),
    "short": PREFIX[:180],  # whole, until it has generated 64 tokens
    "outsider": PREFIX,  # never compressed
}
"""Each keeps 6 blocks of 32 tokens of about 21, and they share 20."""
CROWD = ["same", "same", "question 0", "question 1", "short", "same", "question 2", "short"]
CROWD += ["same", "outsider"]
NUM_TOKENS = 70
POOL = 40
"""Blocks: the longest sequence, and 8."""


@pytest.fixture(scope="module")
def engine(probe_model: str) -> Iterator[Engine]:
    with opened(
        probe_model, SETTING, num_blocks=1 + POOL, max_model_len=1024, async_scheduling=True
    ) as engine:
        yield engine


SAMPLES = {"kv_compression": "snapkv", "kv_budget_tokens": 160}
"""A preset that compresses when prompts end, and never again."""


Found = list[tuple[list[int], list[int]]]


def run(engine: Engine, prompts: list[str]) -> Found:
    """These at once: tokens, and where each was compacted since it last started."""
    assert engine.scheduler.reset_prefix_cache()
    positions: dict[str, list[int]] = {}
    schedule = engine.scheduler.schedule

    def watched(*args: Any) -> Any:
        output = schedule(*args)
        for new in output.scheduled_new_reqs:
            positions[new.req_id.rsplit("-", 1)[0]] = []
        for plan in StepPlan.of(output).plans:
            positions[plan.request_id.rsplit("-", 1)[0]].append(plan.position)
        return output

    engine.scheduler.schedule = watched
    names = [f"{prompt} {number}" for number, prompt in enumerate(prompts)]
    for name, prompt in zip(names, prompts, strict=True):
        xargs = {"kv_compression": "none"} if prompt == "outsider" else None
        engine.add(name, PROMPTS[prompt], NUM_TOKENS, xargs, ignore_eos=True)
    while engine.engine.has_unfinished_requests():
        engine.step()
        engine.scheduler.check_integrity()
    engine.scheduler.schedule = schedule
    assert_idle(engine)
    return [(engine.results[name].token_ids, positions[name]) for name in names]


def test_tokens_do_not_depend_on_who_shares_the_blocks(engine: Engine) -> None:
    """In a pool that holds the prefix once, and few copies of what is kept of it."""
    alone = {prompt: run(engine, [prompt])[0] for prompt in PROMPTS}
    assert [name for name, (_, positions) in alone.items() if not positions] == ["outsider"]
    assert len({tuple(tokens) for tokens, _ in alone.values()}) == len(PROMPTS)
    for crowd in (CROWD, CROWD[::-1]):
        assert run(engine, crowd) == [alone[prompt] for prompt in crowd]
    assert engine.scheduler.stats.deferrals == 0
    assert engine.num_preemptions > 0, "the pool was too large; the test shows less"


def test_samples_of_one_prompt_read_one_copy(engine: Engine) -> None:
    """Alone and at once; what they read is where it was written."""
    assert engine.scheduler.reset_prefix_cache()
    purposes: list[tuple[Purpose, tuple[Any, ...]]] = []
    schedule, prompts = engine.scheduler.schedule, [PROMPTS["same"], PROMPTS["question 0"]]

    def watched(*args: Any) -> Any:
        output = schedule(*args)
        for plan in StepPlan.of(output).plans:
            blocks = tuple(group.destination_blocks for group in plan.groups if group)
            purposes.append((plan.purpose, blocks))
        return output

    engine.scheduler.schedule = watched
    try:
        alone = [engine.generate([each], 40, SAMPLES, ignore_eos=True)[0] for each in prompts]
        plain = engine.generate(prompts, 40, {"kv_compression": "none"}, ignore_eos=True)
        assert alone[0] != plain[0] or alone[1] != plain[1], "it shows what was evicted"
        assert engine.scheduler.reset_prefix_cache()
        purposes.clear()
        found = engine.generate(prompts * 3, 40, SAMPLES, ignore_eos=True)
    finally:
        engine.scheduler.schedule = schedule
    assert found == alone * 3
    written = [blocks for purpose, blocks in purposes if purpose is Purpose.EVICT]
    read = [blocks for purpose, blocks in purposes if purpose is Purpose.ADOPT]
    assert len(written) == 2 and len(read) == 4 and set(read) == set(written)
    assert_idle(engine)

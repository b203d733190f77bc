"""A pool that is too small: preemption, deferral, churn."""

from collections.abc import Iterator

import pytest

from lab.scenarios import churn
from tests.e2e.conftest import FOUR_GROUPS, assert_idle, opened
from vllm_kvcompress.evaluation.engine import Engine

pytestmark = pytest.mark.engine

BLOCKS_PER_GROUP = 100


@pytest.fixture(scope="module")
def engine(probe_model: str) -> Iterator[Engine]:
    """100 blocks of 32 tokens per layer group: two prompts of 1,500 tokens and little more."""
    with opened(
        probe_model, FOUR_GROUPS, num_blocks=1 + 4 * BLOCKS_PER_GROUP, max_model_len=2560
    ) as engine:
        yield engine


def test_preempted_requests_give_the_same_tokens(engine: Engine, prompts) -> None:
    """The first request's second token takes the block that the other's last chunk needed."""
    lengths, xargs = (1599, 1595), [{"kv_compression": "none"}, None]
    long = [(prompts[i] + prompts[i + 1])[:n] for i, n in zip((0, 2), lengths, strict=True)]
    alone = [
        engine.generate([prompt], 24, extra, ignore_eos=True)[0]
        for prompt, extra in zip(long, xargs, strict=True)
    ]
    assert engine.scheduler.reset_prefix_cache(), "a hit would shorten the second prefill"
    preemptions, deferrals = engine.num_preemptions, engine.scheduler.stats.deferrals
    assert engine.generate(long, 24, xargs, ignore_eos=True) == alone
    assert engine.num_preemptions > preemptions, "the pool was too large; the test shows nothing"
    assert engine.scheduler.stats.deferrals == deferrals
    assert_idle(engine)


def test_a_compaction_without_room_waits_and_then_runs(engine: Engine, prompts) -> None:
    filler = [5 + token % 900 for token in prompts[0]][:1100]
    prompt = (prompts[1] + prompts[2])[:2000]
    expected = engine.generate([prompt], 60, ignore_eos=True)[0]
    deferrals = engine.scheduler.stats.deferrals
    compactions = engine.scheduler.stats.compactions.get("windowkv/prompt", 0)
    engine.add("filler", filler, 30, {"kv_compression": "none"}, ignore_eos=True)
    engine.add("late", prompt, 60, ignore_eos=True)
    engine.drain()
    stats = engine.scheduler.stats
    assert stats.deferrals > deferrals, "there was room at once; the test shows nothing"
    assert stats.compactions["windowkv/prompt"] == compactions + 1
    # Until then it decoded over its whole cache, so only its length is the same.
    assert len(engine.results["late"].token_ids) == len(expected)
    assert_idle(engine)


def test_a_request_that_never_found_room_is_counted(engine: Engine, prompts) -> None:
    filler = [5 + token % 800 for token in prompts[0]][:1100]
    prompt = (prompts[3] + prompts[4])[:2000]
    before = engine.scheduler.stats.uncompressed.get("no_room", 0)
    engine.add("filler", filler, 40, {"kv_compression": "none"}, ignore_eos=True)
    engine.add("short", prompt, 3, ignore_eos=True)
    engine.drain()
    assert engine.scheduler.stats.uncompressed["no_room"] == before + 1
    assert len(engine.results["short"].token_ids) == 3
    assert_idle(engine)


def test_churn_leaves_nothing_behind(engine: Engine) -> None:
    report = churn(engine, 24, seed=5)
    assert report.blocks_missing == 0
    assert report.evicted_left == 0
    assert report.finished > 3
    assert report.aborted_in_prefill > 0
    assert report.aborted_in_decode > 0
    assert_idle(engine)

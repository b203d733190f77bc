"""A pool that is too small: preemption, compactions in place, churn."""

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


def test_a_compaction_without_room_happens_in_place(engine: Engine, prompts) -> None:
    """It once waited, and the request decoded over its whole cache: other tokens under load."""
    filler = [5 + token % 900 for token in prompts[0]][:1100]
    prompt = (prompts[1] + prompts[2])[:2000]
    stats, taken, gained = engine.scheduler.stats, [], []
    for name in ("alone", "crowded"):
        assert engine.scheduler.reset_prefix_cache()
        before = stats.blocks_taken.get("windowkv", 0), stats.blocks_returned.get("windowkv", 0)
        if name == "crowded":
            engine.add("filler", filler, 30, {"kv_compression": "none"}, ignore_eos=True)
        engine.add(name, prompt, 60, ignore_eos=True)
        engine.drain()
        taken.append(stats.blocks_taken["windowkv"] - before[0])
        returned = stats.blocks_returned["windowkv"] - before[1]
        gained.append(returned - taken[-1])
        assert_idle(engine)
    assert taken[0] > taken[1], "there was room at once; the test shows nothing"
    assert gained[0] == gained[1] > 4 * 62 // 2
    assert stats.deferrals == 0
    assert engine.results["crowded"].token_ids == engine.results["alone"].token_ids


def test_what_is_overwritten_is_found_by_nobody(engine: Engine, prompts) -> None:
    """The prompt again: its first blocks are hits, the overwritten ones are computed anew."""
    prompt = (prompts[3] + prompts[4])[:2000]
    none = {"kv_compression": "none"}
    assert engine.scheduler.reset_prefix_cache()
    expected = engine.generate([prompt], 12, none, ignore_eos=True)[0]
    assert engine.scheduler.reset_prefix_cache()
    taken = engine.pool.get_new_blocks(engine.pool.get_num_free_blocks() - 4 * 63)
    engine.add("first", prompt, 12, ignore_eos=True)
    engine.drain()
    engine.pool.free_blocks(taken)
    engine.add("again", prompt, 12, none, ignore_eos=True)
    engine.drain()
    assert engine.results["again"].token_ids == expected
    assert_idle(engine)


def test_churn_leaves_nothing_behind(engine: Engine) -> None:
    report = churn(engine, 24, seed=5)
    assert report.blocks_missing == 0
    assert report.evicted_left == 0
    assert report.finished > 3
    assert report.aborted_in_prefill > 0
    assert report.aborted_in_decode > 0
    assert_idle(engine)

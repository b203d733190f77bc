"""Small pools: views are given back before anybody waits, and no compaction waits."""

import pytest

from tests.e2e.conftest import assert_idle, opened
from vllm_kvcompress.evaluation.engine import Engine

pytestmark = pytest.mark.engine

LONG = [5 + (i * 7919) % 900 for i in range(1300)]
DRAFT = {
    "preset": "snapkv", "mode": "draft", "budget": {"ratio": 0.5}, "draft": {"tokens": 3}
}  # fmt: skip
DRAFT_OVER_EVICTED = {
    "preset": "snapkv", "budget": {"ratio": 0.5}, "draft": {"tokens": 3, "budget": {"ratio": 0.25}}
}  # fmt: skip


def serve(engine: Engine) -> tuple[int, dict[str, list[int]]]:
    """Steps and tokens of a long request beside short ones that come later."""
    engine.add("long", LONG, 120, ignore_eos=True)
    engine.add("short", LONG[:100], 5, ignore_eos=True)
    for step in range(3000):
        if not engine.engine.has_unfinished_requests():
            break
        if step in (5, 40):
            engine.add(f"late-{step}", LONG[100 : 500 + step], 20, ignore_eos=True)
        engine.step()
        if hasattr(engine.scheduler, "check_integrity"):
            engine.scheduler.check_integrity()
    assert all(result.finished for result in engine.results.values())
    return step, {name: result.token_ids for name, result in engine.results.items()}


@pytest.mark.parametrize("num_blocks", [46, 66])
def test_views_never_cost_steps(probe_model: str, num_blocks: int) -> None:
    """A cache and its view above the pool once preempted themselves for ever.

    45 blocks are just enough for the long request alone.
    """
    options = {
        "max_model_len": 1440, "num_blocks": num_blocks, "max_num_batched_tokens": 2048
    }  # fmt: skip
    with opened(probe_model, None, **options) as engine:
        stock_steps, expected = serve(engine)
    with opened(probe_model, DRAFT, **options) as engine:
        steps, tokens = serve(engine)
        stats = engine.scheduler.stats
        assert tokens == expected, "draft mode is lossless"
        assert steps <= stock_steps, stats
        assert_idle(engine)


def test_a_view_over_an_evicted_cache_gives_way_too(probe_model: str) -> None:
    options = {"max_model_len": 1440, "num_blocks": 54, "max_num_batched_tokens": 2048}
    with opened(probe_model, None, **options) as engine:
        stock_steps, _ = serve(engine)
    with opened(probe_model, DRAFT_OVER_EVICTED, **options) as engine:
        steps, _ = serve(engine)
        assert steps <= stock_steps
        assert_idle(engine)


def test_a_due_compaction_does_not_wait_under_sustained_load(probe_model: str) -> None:
    """It needs 6 blocks, and waiting prompts take all that come free."""
    setting = {"preset": "snapkv", "budget": {"ratio": 0.12}, "min_prompt_len": 512}
    options = {"max_model_len": 2048, "num_blocks": 67, "max_num_batched_tokens": 2048}
    with opened(probe_model, setting, max_num_seqs=64, **options) as engine:
        count = 0

        def feed() -> None:
            nonlocal count
            while len(engine.scheduler.waiting) < 4:
                count += 1
                prompt = [6 + (count * 31 + i * 17) % 900 for i in range(100)]
                engine.add(f"s{count}", prompt, 25, ignore_eos=True)

        for _ in range(12):
            feed()
            engine.step()
        long = [5 + (i * 7919) % 900 for i in range(1500)]
        engine.add("long", long, 80, ignore_eos=True)
        while not engine.results["long"].finished and engine.num_steps < 700:
            feed()
            engine.step()
            engine.scheduler.check_integrity()
        stats = engine.scheduler.stats
        assert stats.compactions == {"snapkv/prompt": 1}
        assert stats.deferrals == 0
        served = sum(result.finished for result in engine.results.values())
        assert served > 30, "the others go on meanwhile"

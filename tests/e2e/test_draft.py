"""Draft mode: the output is stock vLLM's, whatever the view; drafts save steps."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from lab.scenarios import churn
from tests.e2e.conftest import FOUR_GROUPS, assert_idle, feature_of, opened, serving
from tests.inside import preempt
from vllm_kvcompress.evaluation.engine import Engine, Result
from vllm_kvcompress.worker.draft.feature import DraftFeature
from vllm_kvcompress.worker.draft.step import DraftStep

pytestmark = pytest.mark.engine

DRAFT = {"mode": "draft", "draft": {"tokens": 4}, "min_prompt_len": 128}
SNAPKV = {"preset": "snapkv", "budget": {"ratio": 0.25}, **DRAFT}
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def mixed(prompts) -> list[list[int]]:
    """Long prompts of unequal lengths, one of a single token, one too short for a view."""
    return [prompts[0], prompts[1][:1], prompts[2][-700:], prompts[3][:90], prompts[4][:1000]]


@pytest.fixture(scope="module")
def stock(probe_model: str, mixed) -> list[list[int]]:
    with opened(probe_model, None) as engine:
        return engine.generate(mixed, NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(probe_model: str, stock) -> Iterator[Engine]:
    """After `stock`: only one engine may live at a time."""
    with opened(probe_model, SNAPKV) as engine:
        yield engine


def test_greedy_tokens_are_those_of_stock_vllm(engine: Engine, mixed, stock) -> None:
    """Prefills in chunks, drafting rows, a short prompt and a single token in the same steps."""
    before = engine.num_steps
    assert engine.generate(mixed, NUM_TOKENS, ignore_eos=True) == stock
    assert engine.scheduler.stats.views["snapkv/prompt"] == 3
    assert engine.num_steps - before < NUM_TOKENS + 4, "the short prompt's own steps and no more"
    assert_idle(engine)


def test_drafts_save_steps(engine: Engine, mixed, stock) -> None:
    before = engine.num_steps
    assert engine.generate(mixed[:1], NUM_TOKENS, ignore_eos=True) == stock[:1]
    assert engine.num_steps - before <= 2 + NUM_TOKENS // 2
    assert_idle(engine)


def test_a_request_says_how_many_tokens_to_draft(engine: Engine, mixed, stock) -> None:
    steps = {}
    for count in (0, 1, 4):
        before = engine.num_steps
        found = engine.generate(mixed[:1], NUM_TOKENS, {"kv_draft_tokens": count}, ignore_eos=True)
        assert found == stock[:1]
        steps[count] = engine.num_steps - before
    assert steps[0] >= NUM_TOKENS > steps[1] > steps[4]
    assert engine.scheduler.stats.uncompressed["opted_out"] == 1
    assert_idle(engine)


@pytest.mark.parametrize("budget", [0.03, 1.0])
def test_any_budget_gives_the_same_tokens(engine: Engine, mixed, stock, budget: float) -> None:
    xargs = {"kv_budget_ratio": budget}
    assert engine.generate(mixed[2:3], NUM_TOKENS, xargs, ignore_eos=True) == stock[2:3]
    assert_idle(engine)


@pytest.mark.parametrize("preset", ["keydiff", "streaming_llm", "h2o", "random", "rkv"])
def test_any_policy_chooses_the_view(engine: Engine, mixed, stock, preset: str) -> None:
    found = engine.generate(mixed[:1], NUM_TOKENS, {"kv_compression": preset}, ignore_eos=True)
    assert found == stock[:1]
    assert engine.scheduler.stats.views[f"{preset}/prompt"] == 1
    assert_idle(engine)


def test_the_prompt_stays_in_the_prefix_cache(engine: Engine, mixed, stock) -> None:
    engine.generate(mixed[4:], NUM_TOKENS, ignore_eos=True)
    assert engine.generate(mixed[4:], NUM_TOKENS, ignore_eos=True, name="again") == stock[4:]
    again = [result for name, result in engine.results.items() if name.startswith("again")]
    assert again[0].num_cached_tokens >= 900


def test_stop_tokens_inside_accepted_drafts(engine: Engine, mixed, stock) -> None:
    stop = stock[0][6]
    found = engine.generate(mixed[:1], NUM_TOKENS, stop_token_ids=[stop], ignore_eos=True)[0]
    assert found == stock[0][: stock[0].index(stop) + 1]
    assert_idle(engine)


def test_logprobs_are_those_of_the_target(engine: Engine, mixed) -> None:
    from vllm import SamplingParams

    found = []
    for drafts in (0, 4):
        params = SamplingParams(
            temperature=0,
            max_tokens=8,
            logprobs=2,
            ignore_eos=True,
            extra_args={"kv_draft_tokens": drafts},
        )
        output = engine.llm.generate({"prompt_token_ids": mixed[2]}, params, use_tqdm=False)[0]
        found.append(
            [{t: e.logprob for t, e in each.items()} for each in output.outputs[0].logprobs]
        )
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_structured_output_is_that_without_drafts(engine: Engine, mixed) -> None:
    """vLLM's grammar checks drafts before they are verified; a plain request shares the batch."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    found = []
    for drafts in (0, 4):
        engine.add(f"plain-{drafts}", mixed[4], NUM_TOKENS, ignore_eos=True)
        name = f"structured-{drafts}"
        engine.results[name] = Result()
        params = SamplingParams(
            temperature=0,
            max_tokens=16,
            structured_outputs=StructuredOutputsParams(regex="( [0-9]){5,12}"),
            extra_args={"kv_draft_tokens": drafts},
        )
        engine.engine.add_request(name, {"prompt_token_ids": mixed[0]}, params)
        engine.drain()
        found.append(engine.results[name].token_ids)
    assert found[0] == found[1]
    assert re.fullmatch("( [0-9])+", engine.decode(found[0])), engine.decode(found[0])
    assert_idle(engine)


def test_the_longest_draft_of_a_batch_is_made(engine: Engine, mixed, stock) -> None:
    """Two requests that ask for one and for four drafts share a step."""
    each = [{"kv_draft_tokens": 1}, {"kv_draft_tokens": 4}]
    found = engine.generate([mixed[0], mixed[4]], NUM_TOKENS, each, ignore_eos=True)
    assert found == [stock[0], stock[4]]
    assert_idle(engine)


def test_churn_leaves_nothing_behind(engine: Engine) -> None:
    report = churn(engine, 20, seed=3)
    assert (report.blocks_missing, report.evicted_left) == (0, 0)
    assert report.aborted_in_decode > 0
    assert_idle(engine)
    assert not feature_of(engine, DraftFeature).views.exists.any()


# From here on, tests open engines of their own: the shared one must be closed by then.


def test_drafts_that_fail(engine: Engine, mixed, stock) -> None:
    drafts_fail_once(engine, mixed, stock)
    logits_are_no_numbers(engine, mixed, stock)


def test_views_of_whole_blocks_copy_nothing(probe_model: str, mixed, stock) -> None:
    """WindowKV's windows are blocks here: no block is held beyond those of an undrafted request."""
    setting = {**FOUR_GROUPS, "budget": {"ratio": 0.25}, **DRAFT}
    with opened(probe_model, setting) as engine:
        held = {}
        for drafts in (0, 4):
            engine.add(
                str(drafts), mixed[0], NUM_TOKENS, {"kv_draft_tokens": drafts}, ignore_eos=True
            )
            while len(engine.results[str(drafts)].token_ids) < 2:
                engine.step()
            held[drafts] = engine.num_usable_blocks - engine.pool.get_num_free_blocks()
            engine.scheduler.check_integrity()
            engine.drain()
        assert held[0] <= held[4] <= held[0] + 4, "at most a block of lookahead per group"
        assert engine.results["0"].token_ids == engine.results["4"].token_ids == stock[0]
        assert engine.generate(mixed, NUM_TOKENS, ignore_eos=True) == stock
        assert engine.scheduler.stats.views["windowkv/prompt"] == 4
        assert_idle(engine)
        drafts_fail_once(engine, mixed, stock)


def test_layer_groups_have_views_of_their_own(probe_model: str, mixed, stock) -> None:
    """Windows of half a block: survivors are copied, a different number in each group."""
    setting = {**FOUR_GROUPS, "budget": {"ratio": 0.25}, **DRAFT}
    setting["policy"] = {"window_size": 16, "layers_per_leader": None}
    with opened(probe_model, setting) as engine:
        assert engine.generate(mixed, NUM_TOKENS, ignore_eos=True) == stock
        assert engine.scheduler.stats.views["windowkv/prompt"] == 3
        assert_idle(engine)


def test_preempted_requests_give_the_same_tokens(probe_model: str, mixed, stock) -> None:
    """Views are dropped with a preempted request and taken again."""
    with opened(probe_model, SNAPKV, num_blocks=1 + 160, max_model_len=2048) as engine:
        engine.add("0", mixed[0], NUM_TOKENS, ignore_eos=True)
        while engine.live()["0"].num_output_tokens < 3:
            engine.step()
        request = engine.live()["0"]
        preempt(engine, request)
        engine.add("1", mixed[4], NUM_TOKENS, ignore_eos=True)
        engine.drain()
        found = [engine.results[name].token_ids for name in ("0", "1")]
        assert found == [stock[0], stock[4]]
        assert engine.num_preemptions > 0
        assert engine.scheduler.stats.views["snapkv/prompt"] == 3
        assert_idle(engine)


def watch_lengths(step: DraftStep) -> list[bool]:
    """One entry per draft step: do its rows read what they hold, and no slot more?"""
    found: list[bool] = []
    prepare = step.prepare

    def watched(number: int) -> Any:
        attention = prepare(number)
        rows = step._rows.requests_np
        ends = step.positions[: len(rows)].numpy() + 1
        for group, lengths in enumerate(step.seq_lens[:, : len(rows)].numpy()):
            lost = step._evicted.np[group, rows] + step._views.num_dropped_np(group, rows)
            found.append(bool((lengths == ends - lost).all()))
        return attention

    step.prepare = watched  # type: ignore[method-assign]
    return found


def test_drafting_over_a_cache_that_evicts(probe_model: str, mixed) -> None:
    """Tokens are those of the evicting server without drafts, from fewer steps."""
    evicting = {"preset": "snapkv", "budget": {"ratio": 0.5}, "min_prompt_len": 128}
    evicting |= {"layer_groups": {"count": 2}, "layer_budget": {"shape": "pyramid", "beta": 4}}
    with opened(probe_model, evicting) as engine:
        expected = engine.generate(mixed, NUM_TOKENS, ignore_eos=True)
        steps = engine.num_steps
    both = {**evicting, "draft": {"tokens": 4, "budget": {"ratio": 0.12}}}
    with opened(probe_model, both) as engine:
        lengths = watch_lengths(engine.runner.speculator.step)
        assert engine.generate(mixed, NUM_TOKENS, ignore_eos=True) == expected
        assert engine.num_steps < steps and len(lengths) > 8 and all(lengths)
        stats = engine.scheduler.stats
        assert stats.compactions["snapkv/prompt"] == stats.views["snapkv/prompt"] == 3
        assert_idle(engine)
        before = engine.num_steps
        none = {"kv_draft_tokens": 0}
        assert engine.generate(mixed[:1], NUM_TOKENS, none, ignore_eos=True) == expected[:1]
        assert engine.num_steps - before >= NUM_TOKENS
        assert stats.compactions["snapkv/prompt"] == 4, "it is compressed all the same"
        with serving(engine, {**both, "trigger": "prompt", "prompt_interval": 256}):
            inside = engine.generate(mixed, NUM_TOKENS, none, ignore_eos=True)
            assert stats.compactions["snapkv/prompt"] > 4 + 3, "more than one a prompt"
            assert engine.generate(mixed, NUM_TOKENS, ignore_eos=True) == inside
        assert_idle(engine)
        report = churn(engine, 12, seed=6)
        assert (report.blocks_missing, report.evicted_left) == (0, 0)
        assert_idle(engine)


ADAPTIVE = {"tokens": 6, "adaptive": True, "min_confidence": 0.6}
REFRESHED = {"tokens": 4, "refresh_every": 8, "refresh_below": 0.5, "sample": "probabilistic"}


@pytest.mark.parametrize("draft", [ADAPTIVE, REFRESHED], ids=["adaptive", "refreshed"])
def test_variants_of_drafting_give_the_same_tokens(probe_model, mixed, stock, draft: dict) -> None:
    setting = {**SNAPKV, "budget": {"ratio": 0.06}, "draft": draft}
    with opened(probe_model, setting) as engine:
        assert engine.generate(mixed, NUM_TOKENS, ignore_eos=True) == stock
        refreshed = engine.scheduler.stats.views.get("snapkv/refresh", 0)
        assert (refreshed >= 3) == ("refresh_every" in draft)
        assert_idle(engine)
        report = churn(engine, 12, seed=4)
        assert (report.blocks_missing, report.evicted_left) == (0, 0)
        assert_idle(engine)


def test_a_pool_without_room_for_a_view(probe_model: str, prompts) -> None:
    """The request decodes without drafts, as stock vLLM would, and is counted; nothing is lost.

    Its prompt ends in a chunk of one token; the second one runs in a pool with room.
    """
    prompt = (prompts[0] + prompts[1])[:1025]
    found = {}
    for num_blocks in (1 + 36, 1 + 60):
        with opened(probe_model, SNAPKV, num_blocks=num_blocks, max_model_len=1100) as engine:
            found[num_blocks] = engine.generate([prompt], NUM_TOKENS, ignore_eos=True)
            stats, has_room = engine.scheduler.stats, num_blocks > 50
            assert stats.views.get("snapkv/prompt", 0) == has_room
            assert stats.uncompressed.get("no_room", 0) == (not has_room)
            assert (stats.deferrals > 0) == (not has_room)
            assert (engine.num_steps >= NUM_TOKENS) == (not has_room)
            assert_idle(engine)
    assert found[1 + 36] == found[1 + 60]


def test_an_eviction_does_not_wait_for_a_view(probe_model: str, prompts) -> None:
    """Room for 8 survivors' blocks, not for a view besides: evicted, and never drafted."""
    setting = {"preset": "snapkv", "budget": {"ratio": 0.25}, "min_prompt_len": 128}
    setting["draft"] = {"tokens": 4, "budget": {"tokens": 128}}
    with opened(probe_model, setting, num_blocks=1 + 43, max_model_len=1100) as engine:
        engine.generate([prompts[0][:1020]], NUM_TOKENS, ignore_eos=True)
        stats = engine.scheduler.stats
        assert stats.compactions["snapkv/prompt"] == 1 and not stats.deferrals
        assert not stats.views
        assert_idle(engine)


def test_async_scheduling_gives_the_same_tokens(probe_model: str, mixed, stock) -> None:
    with opened(probe_model, SNAPKV, async_scheduling=True) as engine:
        assert engine.core.batch_queue is not None
        assert engine.generate(mixed, NUM_TOKENS, ignore_eos=True) == stock
        assert_idle(engine)
        drafts_fail_once(engine, mixed, stock)
        logits_are_no_numbers(engine, mixed, stock)


def drafts_fail_once(engine: Engine, mixed: list[list[int]], stock: list[list[int]]) -> None:
    """In the middle of a step's drafts: all that drafted in it go on without, and are counted."""
    engine.scheduler.stats.clear()
    step, failed, later = engine.runner.speculator.step, set[int](), set[int]()
    real, left = step.run, 6

    def run(count: int, attention: Any) -> None:
        nonlocal left
        left -= 1
        rows = set(step._rows.requests_np.tolist())
        if left == 0:
            failed.update(rows)
            raise RuntimeError("Triton Error [CUDA]: out of resources")
        later.update(rows if left < 0 else ())
        real(count, attention)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "run", run)
        assert engine.generate(mixed, NUM_TOKENS, ignore_eos=True) == stock
    stats = engine.scheduler.stats
    assert failed and stats.failures == {"drafting": len(failed)}
    assert stats.uncompressed == {"short_prompt": 2} and not stats.views_given_up
    assert not failed & later, "one of them drafts again"
    assert_idle(engine)
    before = engine.num_steps
    assert engine.generate(mixed[:1], NUM_TOKENS, ignore_eos=True) == stock[:1]
    assert engine.num_steps - before <= 2 + NUM_TOKENS // 2, "later requests draft"


def logits_are_no_numbers(engine: Engine, mixed: list[list[int]], stock: list[list[int]]) -> None:
    """One token's of one request: it goes on without drafts and is counted once; others draft."""
    engine.scheduler.stats.clear()
    step = engine.runner.speculator.step
    real, drafted = step._sample, list[int]()

    def sample(logits: Any) -> Any:
        rows = step.requests[: len(logits)].tolist()
        drafted.extend(rows)
        if drafted[0] in rows:
            logits = logits.clone()
            logits[rows.index(drafted[0]), 5] = float("nan")
        return real(logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "_sample", sample)
        assert engine.generate(mixed, NUM_TOKENS, ignore_eos=True) == stock
    stats = engine.scheduler.stats
    assert stats.failures == {"nan_drafts": 1}
    assert stats.uncompressed == {"short_prompt": 2} and not stats.views_given_up
    counts = Counter(drafted)
    assert counts.pop(drafted[0]) <= 3 * 4 < min(counts.values()), "steps that were under way"
    assert_idle(engine)


def test_speculation_beside_draft_mode_is_refused(probe_model: str) -> None:
    ngram: Any = {"method": "ngram", "num_speculative_tokens": 2}
    with (
        pytest.raises(Exception, match="the mode draft brings its own drafts"),
        opened(probe_model, SNAPKV, speculative_config=ngram),
    ):
        pass

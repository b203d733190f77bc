"""The replay of draft-then-verify: its strides are the engine's, its cache what it should be."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from lab.speculation.acceptance import (
    Continuation,
    Walk,
    continue_exactly,
    plain_text,
    summarize,
    walk,
)
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.evaluation.seeds import prompt_seed
from vllm_kvcompress.evaluation.tasks.needle import make_samples
from vllm_kvcompress.request_options import parse_request, resolve_request

DRAFT = {"preset": "snapkv", "mode": "draft", "draft": {"tokens": 4}, "min_prompt_len": 128}
PROMPT_LEN = 10
SURVIVORS = [-1.0, -2.0, -3.0]
TOKENS = list(range(100, 120))


class ScriptedReplay:
    """One layer of one number per token; drafts are right but behind the positions in `wrong`.

    Exact keys of generated token i are i + 1000, keys that drafting writes are 0.
    """

    def __init__(self, wrong: set[int], survivors: list[float] = SURVIVORS) -> None:
        self.wrong, self.survivors = wrong, survivors
        self.seen: list[list[float]] = []

    def view(self, prompt: Any, config: Any, seed: int = 0) -> DynamicCache:
        cache = DynamicCache()
        rows = torch.tensor(self.survivors)[None, None, :, None]
        cache.update(rows, rows.clone(), 0)
        return cache

    def next_token(self, cache: DynamicCache, token: int, position: int) -> int:
        index = position - PROMPT_LEN
        self.seen.append(cache.layers[0].keys.flatten().tolist())
        assert len(self.seen[-1]) == len(self.survivors) + index
        assert cache.layers[0].values.flatten().tolist() == self.seen[-1]
        cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
        assert token == TOKENS[index], "drafting goes on behind a wrong draft"
        return -5 if index in self.wrong else TOKENS[index + 1]


def scripted(replay: ScriptedReplay, num_tokens: int, **draft: Any) -> Walk:
    keys = torch.arange(len(TOKENS) - 1.0)[None, None, :, None] + 1000
    config = parse_config({**DRAFT, "draft": {"tokens": 4, **draft}})
    assert config is not None
    prompt: Any = SimpleNamespace(token_ids=[0] * PROMPT_LEN)
    continuation = Continuation(TOKENS, [keys], [keys.clone()])
    return walk(replay, prompt, continuation, config, num_tokens)  # type: ignore[arg-type]


def test_strides_and_what_each_draft_reads() -> None:
    replay = ScriptedReplay(wrong={2, 3, 9})
    found = scripted(replay, 12)
    # From 0: tokens 1 and 2 are right, 3 is wrong; verified up to 3. From 3: none. From 4: four
    # right, up to 9. From 9: none. From 10: four right, beyond the twelve tokens asked for.
    assert found == Walk([2, 0, 4, 0, 4], 4, len(SURVIVORS))
    starts = [(0, 3), (3, 1), (4, 4), (9, 1), (10, 4)]
    expected = [
        SURVIVORS + [1000.0 + i for i in range(start)] + [0.0] * step
        for start, count in starts
        for step in range(count)
    ]
    assert replay.seen == expected
    assert scripted(ScriptedReplay(replay.wrong), 11).accepted == [2, 0, 4, 0], "ends on a token"


def test_a_view_of_everything_is_no_view() -> None:
    found = scripted(ScriptedReplay(set(), [0.0] * PROMPT_LEN), 6)
    assert found == Walk([0] * 5, 0, PROMPT_LEN)


@pytest.mark.parametrize("draft", [{"adaptive": True}, {"min_confidence": 0.5}])
def test_what_is_not_replayed_is_refused(draft: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="draft.adaptive false"):
        scripted(ScriptedReplay(set()), 6, **draft)


def test_a_short_continuation_is_refused() -> None:
    assert scripted(ScriptedReplay(set()), 17).accepted
    with pytest.raises(ValueError, match="needs a continuation of 21"):
        scripted(ScriptedReplay(set()), 18)


def test_summary_counts_steps_not_prompts() -> None:
    walks = [Walk([4, 4], 4, 10.0), Walk([0, 1, 0, 0, 0, 1], 4, 20.0)]
    found = summarize(walks, 4)
    assert found.length == pytest.approx((10 + 8) / 8)
    assert found.per_position == pytest.approx([4 / 8, 2 / 8, 2 / 8, 2 / 8])
    assert (found.view_tokens, found.num_prompts, found.num_steps) == (15.0, 2, 8)
    assert (found.low, found.high) == pytest.approx((8 / 6, 5.0)), "one prompt twice is drawn often"


def test_walks_without_a_view_have_no_positions() -> None:
    found = summarize([Walk([0, 0, 0], 0, 30.0)] * 2, 4)
    assert (found.length, found.low, found.high) == (1.0, 1.0, 1.0)
    assert np.isnan(found.per_position).all()
    mixed = summarize([Walk([0, 0, 0], 0, 30.0), Walk([2], 4, 9.0)], 4)
    assert mixed.per_position == [1, 1, 0, 0] and mixed.length == pytest.approx(6 / 4)
    with pytest.raises(ValueError, match="num_drafts=3"):
        summarize([Walk([2], 4, 9.0)], 3)


def test_interval_narrows_with_prompts() -> None:
    walks = [Walk([4] * (i % 3), 4, 9.0) if i % 3 else Walk([0] * 4, 4, 9.0) for i in range(60)]
    few, many = summarize(walks[:6], 4), summarize(walks, 4)
    assert few.length == pytest.approx(many.length)
    assert 0 < many.high - many.low < (few.high - few.low) / 2


def test_plain_text_has_no_needle_and_breaks_off() -> None:
    for sample in make_samples(4, 400, str.split, seed=2):  # type: ignore[arg-type]
        text = plain_text(sample)
        assert sample.answer not in text and "magic" not in text and "\n" not in text
        assert "  " not in text and not text.endswith(".")
        assert len(text.split()) > 0.8 * len(sample.prompt.split()) - 60


def test_prompt_seed_is_the_schedulers() -> None:
    from vllm_kvcompress.core.compactions import prompt_checksum

    request: Any = SimpleNamespace(prompt_token_ids=[5, 0, 4095])
    assert prompt_seed([5, 0, 4095]) == prompt_checksum(request, 3)


CASES: list[tuple[str, float]] = [("snapkv", 0.12), ("random", 0.5)]
NUM_TOKENS = 14


@pytest.mark.engine
def test_strides_are_the_engines(probe_model: str) -> None:
    """Equal tokens, and equal numbers of accepted drafts in every verification."""
    replay = Replay(probe_model)
    server = parse_config(DRAFT)
    assert server is not None
    engine = Engine(probe_model, DRAFT, max_model_len=1024)
    try:
        samples = make_samples(2, 700, engine.tokenize, seed=6)
        prompts = [engine.tokenize(samples[0].prompt), engine.tokenize(plain_text(samples[1]))]
        xargs = [{"kv_compression": name, "kv_budget_ratio": ratio} for name, ratio in CASES]
        counted = count_drafts(engine)
        for token_ids in prompts:  # all requests run side by side: steps are slow on a CPU
            for extra in xargs:
                name = f"{len(engine.results)}"
                engine.add(name, token_ids, NUM_TOKENS, extra, ignore_eos=True)
        engine.drain()
        results = [result.token_ids for result in engine.results.values()]
    finally:
        engine.close()
    strides = []
    for token_ids in prompts:
        prompt = replay.prefill(token_ids)
        continuation = continue_exactly(replay, prompt, NUM_TOKENS + 3)
        for extra in xargs:
            assert results[len(strides)] == continuation.tokens[:NUM_TOKENS], extra
            config = resolve_request(server, parse_request(extra))
            assert config is not None
            seed = prompt_seed(token_ids)
            found = walk(replay, prompt, continuation, config, NUM_TOKENS, seed)
            expected = [(4, each) for each in found.accepted]
            assert counted[f"{len(strides)}"] == expected, extra
            strides.append(tuple(found.accepted))
    assert len(set(strides)) >= 3, "were all walks alike, their equality would show little"


def count_drafts(engine: Engine) -> dict[str, list[tuple[int, int]]]:
    """(drafts, accepted) of every verification by request, as told to vLLM's own counters."""
    counted: dict[str, list[tuple[int, int]]] = {}
    original = engine.scheduler.make_spec_decoding_stats

    def count(stats: Any, num_draft_tokens: int, num_accepted_tokens: int, **kwargs: Any) -> Any:
        name = kwargs["request_id"].rsplit("-", 1)[0]
        counted.setdefault(name, []).append((num_draft_tokens, num_accepted_tokens))
        return original(stats, num_draft_tokens, num_accepted_tokens, **kwargs)

    engine.scheduler.make_spec_decoding_stats = count
    return counted

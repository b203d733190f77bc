"""Expected Attention against a transcription of its formula in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.kernels.formulas.test_rotary import turned
from tests.policies.helpers import changed, make_inputs
from tests.policies.test_h2o import SPLITS, chunks, prompt_queries
from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.policies.expected_attention import ExpectedAttention
from vllm_kvcompress.policies.inputs import Queries, ScoreInputs

INV_FREQ = 10000.0 ** (-torch.arange(16) / 16)
DEFAULTS = {
    "n_future_positions": 512,
    "n_sink": 4,
    "use_covariance": True,
    "use_vnorm": True,
    "epsilon": 0.0,
}


def transcribed(
    plain: np.ndarray, given: ScoreInputs, params: dict[str, Any], skip: int | None = None
) -> np.ndarray:
    """[H, m, D] queries before RoPE -> [KV, n] scores, one query head and one key at a time."""
    settings = {**DEFAULTS, **params}
    sinks = settings["n_sink"]
    keys, values = given.keys.double().numpy(), given.values.double().numpy()
    num_kv_heads, num_tokens, dim = keys.shape
    group = plain.shape[0] // num_kv_heads
    positions = range(given.position, given.position + settings["n_future_positions"])
    assert given.rotary is not None
    average = np.mean(
        [turned(np.eye(dim), np.full(dim, position), given.rotary).T for position in positions],
        axis=0,
    )
    scores = np.zeros((num_kv_heads, num_tokens))
    for head in range(plain.shape[0]):
        used = plain[head, sinks if skip is None else skip :]
        mean = average @ used.mean(axis=0)
        covariance = average @ np.cov(used.T, bias=True) @ average.T
        logits = np.zeros(num_tokens - sinks)
        for j, key in enumerate(keys[head // group, sinks:]):
            logits[j] = mean @ key * given.scale
            if settings["use_covariance"]:
                logits[j] += key @ covariance @ key * given.scale**2 / 2
        weights = np.exp(logits - logits.max())
        scores[head // group, sinks:] += weights / weights.sum() / group
    for head in range(num_kv_heads):
        if settings["use_vnorm"]:
            for j in range(sinks, num_tokens):
                length = np.sqrt((values[head, j] ** 2).sum())
                scores[head, j] = (scores[head, j] + settings["epsilon"]) * length
        scores[head, :sinks] = scores[head, sinks:].max() + 1
    return scores


def after_rope(plain: torch.Tensor, start: int, rotary: Rotary) -> torch.Tensor:
    """Queries as the layer sees them, from [H, m, D] before RoPE."""
    positions = np.arange(start, start + plain.shape[1])
    heads = [turned(head.double().numpy(), positions, rotary) for head in plain]
    return torch.from_numpy(np.stack(heads)).float()


def scored(
    policy: ExpectedAttention, given: ScoreInputs, plain: torch.Tensor, sizes: list[int]
) -> torch.Tensor:
    """Scores at the end of a prompt whose queries before RoPE are `plain`."""
    assert given.rotary is not None
    state = None
    for chunk in chunks(after_rope(plain, 0, given.rotary), given, sizes):
        state = policy.accumulate(state, chunk)
    return policy.score(changed(given, queries=None, accumulated=state))


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [32, 20])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"use_covariance": False},
        {"use_vnorm": False, "epsilon": 0.5},
        {"epsilon": 0.01, "n_sink": 0},
        {"n_sink": 11, "n_future_positions": 1},
    ],
)
def test_scores_match_the_transcription(
    params: dict[str, Any], rotary_dim: int, is_neox: bool
) -> None:
    given = make_inputs(rotary=Rotary(INV_FREQ[: rotary_dim // 2], is_neox))
    plain = prompt_queries(given) * 2 + 0.5
    expected = transcribed(plain.double().numpy(), given, params)
    found = scored(ExpectedAttention(**params), given, plain, [150])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=5e-4, atol=1e-7)


@pytest.mark.parametrize("sizes", [*SPLITS, [3, 1, 146], [2, 2, 1, 145]])
def test_chunks_give_the_scores_of_one_chunk(sizes: list[int]) -> None:
    """Also chunks that end inside, at and just after the sinks."""
    given = make_inputs()
    plain = prompt_queries(given) + 1
    whole = scored(ExpectedAttention(), given, plain, [150])
    found = scored(ExpectedAttention(), given, plain, sizes)
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-7)
    expected = transcribed(plain.double().numpy(), given, {})
    np.testing.assert_allclose(found.numpy(), expected, rtol=5e-4, atol=1e-7)


def test_during_decoding_the_window_gives_the_statistics() -> None:
    """70 of 1,000 tokens are left; the last 16 queries stand at positions 984 to 999."""
    given = make_inputs(num_tokens=70, position=1000)
    assert given.queries is not None
    assert given.rotary is not None
    plain = given.queries * 1.5 + 0.5
    given = changed(given, queries=after_rope(plain, 984, given.rotary))
    expected = transcribed(plain.double().numpy(), given, {}, skip=0)
    np.testing.assert_allclose(
        ExpectedAttention().score(given).numpy(), expected, rtol=5e-4, atol=1e-7
    )


def test_position_matters() -> None:
    given, later = make_inputs(), make_inputs(position=100_000)
    plain = prompt_queries(given) + 1
    assert not torch.equal(
        scored(ExpectedAttention(), given, plain, [150]),
        scored(ExpectedAttention(), later, plain, [150]),
    )


def test_a_rank_with_one_head_scores_as_one_with_both() -> None:
    given = make_inputs()
    plain = prompt_queries(given)
    whole = scored(ExpectedAttention(), given, plain, [100, 50])
    for rank in range(2):
        heads = slice(rank, rank + 1)
        part = make_inputs(keys=given.keys[heads], values=given.values[heads])
        found = scored(ExpectedAttention(), part, plain[4 * rank :][:4], [100, 50])
        torch.testing.assert_close(found, whole[heads])


@pytest.mark.parametrize("num_tokens", [1, 4, 5])
def test_prompts_of_sinks_only_get_finite_scores(num_tokens: int) -> None:
    given = make_inputs(num_tokens, window=1)
    found = scored(ExpectedAttention(), given, prompt_queries(given), [num_tokens])
    assert found.shape == (2, num_tokens)
    assert found.isfinite().all()


def test_bfloat16_gives_float32_scores_near_the_exact_ones() -> None:
    exact = make_inputs()
    given = make_inputs(keys=exact.keys.bfloat16(), values=exact.values.bfloat16())
    assert given.rotary is not None
    queries = after_rope(prompt_queries(given), 0, given.rotary).bfloat16()
    state = ExpectedAttention().accumulate(None, next(chunks(queries, given, [150])))
    assert state.mean.dtype == state.scatter.dtype == torch.float32
    found = ExpectedAttention().score(changed(given, accumulated=state))
    assert found.dtype == torch.float32
    expected = transcribed(prompt_queries(given).double().numpy(), given, {})
    np.testing.assert_allclose(found.numpy(), expected, rtol=0.1)


def test_needs_are_declared_and_missing_ones_noticed() -> None:
    policy = ExpectedAttention()
    assert policy.queries is Queries.PROMPT
    assert policy.needs_rotary
    assert policy.runs_while_decoding
    with pytest.raises(AssertionError):
        policy.score(make_inputs(queries=None))
    with pytest.raises(AssertionError):
        policy.score(make_inputs(rotary=None))


@pytest.mark.parametrize(
    "params", [{"n_future_positions": 0}, {"n_sink": -1}, {"epsilon": -0.1}, {"n_sinks": 4}]
)
def test_settings_without_meaning_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ExpectedAttention(**params)

"""LagKV against a transcription of its formula in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.policies.helpers import make_inputs, select
from vllm_kvcompress.policies.inputs import Queries
from vllm_kvcompress.policies.lagkv import LagKV


def contrast(block: np.ndarray, following: np.ndarray) -> np.ndarray:
    """[lag, D], [lag, D] -> [lag]: softmax of each token's spread on the next block's scale."""
    spreads = []
    for token in block:
        scaled = [
            (token[c] - following[:, c].min()) / (following[:, c].max() - following[:, c].min())
            for c in range(token.shape[0])
        ]
        spreads.append(np.std(scaled, ddof=1))
    weights = np.exp(np.array(spreads) - max(spreads))
    return weights / weights.sum()


def transcribed(
    keys: np.ndarray, values: np.ndarray, n_sink: int, lag_size: int, cross_scoring: bool
) -> np.ndarray:
    """[n, D] keys and values of one head -> [c] scores of the c tokens in compared blocks."""
    scores = []
    num_blocks = (len(keys) - n_sink) // lag_size
    for block in range(num_blocks - 1):
        start = n_sink + block * lag_size
        this, following = (
            slice(start, start + lag_size),
            slice(start + lag_size, start + 2 * lag_size),
        )
        mean = contrast(keys[this], keys[following]) / 2
        mean += contrast(values[this], values[following]) / 2
        if not cross_scoring:
            mean = np.array([(mean < one).sum() for one in mean]) / lag_size
        scores.append(mean)
    return np.concatenate(scores) if scores else np.zeros(0)


@pytest.mark.parametrize("cross_scoring", [False, True])
@pytest.mark.parametrize(
    ("n_sink", "lag_size", "num_compared"),
    [(4, 16, 128), (4, 48, 96), (0, 50, 100), (3, 49, 98), (4, 73, 73), (2, 8, 136)],
)
def test_scores_match_the_transcription(
    n_sink: int, lag_size: int, num_compared: int, cross_scoring: bool
) -> None:
    """150 tokens; blocks that fill them to the last one, with a remainder, and only just two."""
    given = make_inputs()
    policy = LagKV(n_sink=n_sink, lag_size=lag_size, cross_scoring=cross_scoring)
    found = policy.score(given).numpy()
    for head in range(2):
        keys, values = given.keys[head].double().numpy(), given.values[head].double().numpy()
        expected = transcribed(keys, values, n_sink, lag_size, cross_scoring)
        assert len(expected) == num_compared
        compared = found[head, n_sink : n_sink + num_compared]
        np.testing.assert_allclose(compared, expected, rtol=1e-4, atol=1e-6)
        assert (found[head, :n_sink] == 2).all()
        after = found[head, n_sink + num_compared :]
        assert (np.diff(after) > 0).all(), "the most recent first"
        assert after.min() > 1
        assert after.max() == 2


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 17, 259])
def test_less_than_two_blocks_keep_the_most_recent(num_tokens: int) -> None:
    scores = LagKV().score(make_inputs(num_tokens, window=1))
    assert scores.shape == (2, num_tokens)
    assert (scores[:, :4] == 2).all()
    assert (scores[:, 4:].diff(dim=1) > 0).all()
    assert (scores > 1).all()


def test_two_blocks_are_enough_to_compare_one() -> None:
    scores = LagKV().score(make_inputs(260))
    assert (scores[:, 4:132] < 1).all()
    assert (scores[:, 132:] > 1).all()


def test_every_block_keeps_as_many_tokens() -> None:
    """One block's keys are ten times as loud: ranks do not care, scores across blocks do."""
    given = make_inputs(260)
    keys = given.keys.clone()
    keys[:, 4:36] *= 10
    loud = make_inputs(260, keys=keys)
    kept = {}
    for cross_scoring in (False, True):
        policy = LagKV(lag_size=32, cross_scoring=cross_scoring)
        # 4 sinks, 7 compared blocks, 32 + 0 recent; half of the compared tokens fit
        chosen = select(policy.score(loud), torch.zeros(260, dtype=torch.bool), 4 + 32 + 112)
        blocks = (chosen[0] - 4) // 32
        kept[cross_scoring] = [int((blocks == block).sum()) for block in range(8)]
    assert kept[False] == [16] * 7 + [32]
    assert kept[True] != kept[False]


def test_one_token_unlike_the_next_block_is_kept() -> None:
    given = make_inputs(260)
    keys, values = given.keys.clone(), given.values.clone()
    keys[:, 40] *= 5
    values[:, 40] *= 5
    scores = LagKV().score(make_inputs(260, keys=keys, values=values))
    assert (scores[:, 4:132].argmax(dim=1) == 36).all()


@pytest.mark.parametrize("cross_scoring", [False, True])
def test_repeated_tokens_get_finite_scores(cross_scoring: bool) -> None:
    """Regression guard: a block of equal values has no range to divide by."""
    given = make_inputs(values=torch.ones(2, 150, 32), keys=torch.zeros(2, 150, 32))
    assert LagKV(lag_size=16, cross_scoring=cross_scoring).score(given).isfinite().all()
    values = torch.ones(2, 150, 32)
    values[:, :30] = 1000 * torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))
    given = make_inputs(values=values.bfloat16())
    assert LagKV(lag_size=16, cross_scoring=cross_scoring).score(given).isfinite().all()


def test_heads_are_independent_and_no_queries_are_read() -> None:
    given, policy = make_inputs(queries=None), LagKV(lag_size=16)
    whole = policy.score(given)
    assert policy.queries is Queries.NONE
    assert policy.runs_while_decoding
    for head in range(2):
        one = slice(head, head + 1)
        part = make_inputs(keys=given.keys[one], values=given.values[one])
        assert torch.equal(policy.score(part), whole[one])


@pytest.mark.parametrize("params", [{"lag_size": 1}, {"n_sink": -1}, {"lag": 8}])
def test_settings_without_meaning_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LagKV(**params)

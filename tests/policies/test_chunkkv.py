"""ChunkKV against loops in float64."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.policies.helpers import attention_by_loops, best_first, make_inputs, select
from vllm_kvcompress.policies.chunkkv import ChunkKV

ATTENTION = {"name": "snapkv", "kernel_size": 1}


def chunks(num_tokens: int, length: int) -> list[range]:
    starts = range(0, num_tokens, length)
    return [range(start, min(start + length, num_tokens)) for start in starts]


def order_by_loops(tokens: np.ndarray, forced: list[bool], length: int) -> list[int]:
    """Tokens from the first to be kept to the last: chunk after chunk of [heads, n] scores."""
    means = []
    for chunk in chunks(tokens.shape[1], length):
        mean = sum(tokens[:, token].sum() for token in chunk) / len(chunk)
        means.append((any(forced[token] for token in chunk), mean, chunk))
    means.sort(key=lambda item: (not item[0], -item[1]))
    return [token for _, _, chunk in means for token in chunk]


@pytest.mark.parametrize("length", [1, 7, 20, 200])
@pytest.mark.parametrize("num_tokens", [17, 140, 150])
def test_ranks_chunks_by_their_mean_over_heads(length: int, num_tokens: int) -> None:
    given = make_inputs(num_tokens)
    tokens = attention_by_loops(given).mean(axis=1).reshape(2, 4, num_tokens).mean(axis=1)
    found = ChunkKV(chunk_length=length, scorer=ATTENTION).score(given)
    assert torch.equal(found[0], found[1]), "one choice for all heads"
    expected = order_by_loops(tokens, given.forced.tolist(), length)
    assert best_first(found[0].numpy()) == expected


def test_tokens_of_a_chunk_score_alike_and_chunks_do_not() -> None:
    scores = ChunkKV().score(make_inputs())[0]
    values = [scores[chunk.start : chunk.stop].unique() for chunk in chunks(150, 20)]
    assert [value.numel() for value in values] == [1] * 8
    assert torch.cat(values).unique().numel() == 8


def test_a_short_last_chunk_is_not_punished() -> None:
    nothing = torch.zeros(150, dtype=torch.bool)
    keys = torch.ones(2, 150, 32)
    keys[:, 140:] *= 0.5  # shorter keys are better: the last ten tokens are the best chunk
    given = make_inputs(keys=keys, forced=nothing)
    scores = ChunkKV(scorer={"name": "knorm"}).score(given)
    assert best_first(scores[0].numpy())[:10] == list(range(140, 150))


def test_a_chunk_with_a_forced_token_is_kept_whole() -> None:
    forced = torch.zeros(150, dtype=torch.bool)
    forced[[0, 73, 149]] = True
    policy = ChunkKV()
    given = make_inputs(forced=forced, num_keep=50)
    kept = select(policy.score(given), forced, 50)
    whole = {*range(20), *range(60, 80), *range(140, 150)}
    assert [set(row) for row in kept.tolist()] == [whole, whole]


def test_two_ranks_choose_as_one() -> None:
    given = make_inputs()
    assert given.queries is not None
    parts: list[dict[str, Any]] = [
        {"keys": given.keys[r : r + 1], "queries": given.queries[4 * r :][:4]} for r in (0, 1)
    ]
    policy = ChunkKV()
    total = sum(policy.inner.score(make_inputs(**part)) for part in parts)
    for part in parts:
        found = policy.score(make_inputs(**part, num_ranks=2, all_reduce=lambda _: total))
        assert torch.equal(found, policy.score(given)[:1])

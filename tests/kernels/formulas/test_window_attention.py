"""Window attention against loops in float64."""

import numpy as np
import pytest
import torch

from vllm_kvcompress.kernels.formulas.window_attention import window_attention_scores


def loops(queries: np.ndarray, keys: np.ndarray, scale: float) -> np.ndarray:
    """[H, w, D], [KV, n, D] -> [KV, n]: softmax row by row, then means."""
    num_heads, window, _ = queries.shape
    num_kv_heads, num_tokens, _ = keys.shape
    group = num_heads // num_kv_heads
    scores = np.zeros((num_kv_heads, num_tokens))
    for head in range(num_heads):
        for i in range(window):
            visible = num_tokens - window + i + 1
            logits = keys[head // group, :visible] @ queries[head, i] * scale
            weights = np.exp(logits - logits.max())
            scores[head // group, :visible] += weights / weights.sum()
    return scores / (group * window)


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 63, 111, 257])
@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (8, 1), (4, 4)])
def test_matches_loops(heads: tuple[int, int], num_tokens: int) -> None:
    num_heads, num_kv_heads = heads
    window = min(16, num_tokens)
    rng = np.random.default_rng(num_tokens)
    queries = rng.standard_normal((num_heads, window, 24))
    keys = rng.standard_normal((num_kv_heads, num_tokens, 24))
    expected = loops(queries, keys, 0.3)
    found = window_attention_scores(
        torch.from_numpy(queries).float(), torch.from_numpy(keys).float(), 0.3
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(found.sum(dim=1).numpy(), 1.0, rtol=1e-5)


def test_takes_queries_that_are_not_contiguous() -> None:
    stash = torch.randn(8, 4, 16)  # [w, H, D], as it is collected
    keys = torch.randn(2, 40, 16)
    found = window_attention_scores(stash.transpose(0, 1), keys, 0.25)
    expected = window_attention_scores(stash.transpose(0, 1).contiguous(), keys, 0.25)
    assert torch.equal(found, expected)


def test_bfloat16_stays_near_float64() -> None:
    queries, keys = torch.randn(8, 16, 64), torch.randn(2, 200, 64)
    expected = loops(
        queries.bfloat16().double().numpy(), keys.bfloat16().double().numpy(), 64**-0.5
    )
    found = window_attention_scores(queries.bfloat16(), keys.bfloat16(), 64**-0.5)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shapes", [((3, 4, 8), (2, 9, 8)), ((4, 10, 8), (2, 9, 8))])
def test_refuses_shapes_that_do_not_fit(shapes: tuple[tuple, tuple]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        window_attention_scores(torch.zeros(shapes[0]), torch.zeros(shapes[1]), 1.0)

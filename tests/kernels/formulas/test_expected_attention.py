"""Expected attention against its formula in float64, and against attention of drawn queries."""

import numpy as np
import pytest
import torch

from vllm_kvcompress.kernels.formulas.expected_attention import expected_attention_scores


def loops(
    mean: np.ndarray, covariance: np.ndarray | None, keys: np.ndarray, scale: float
) -> np.ndarray:
    """[H, D], [H, D, D], [KV, n, D] -> [KV, n]."""
    num_heads, group = mean.shape[0], mean.shape[0] // keys.shape[0]
    scores = np.zeros(keys.shape[:2])
    for head in range(num_heads):
        logits = np.zeros(keys.shape[1])
        for j, key in enumerate(keys[head // group]):
            logits[j] = scale * np.dot(mean[head], key)
            if covariance is not None:
                logits[j] += scale**2 / 2 * np.dot(key, np.dot(covariance[head], key))
        weights = np.exp(logits - logits.max())
        scores[head // group] += weights / weights.sum() / group
    return scores


def random_case(num_heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num_heads)
    root = rng.standard_normal((num_heads, 12, 12))
    return (
        rng.standard_normal((num_heads, 12)),
        root @ root.transpose(0, 2, 1) / 12,
        rng.standard_normal((2, 50, 12)),
    )


@pytest.mark.parametrize("num_heads", [2, 8])
@pytest.mark.parametrize("use_covariance", [True, False])
def test_matches_loops(num_heads: int, use_covariance: bool) -> None:
    mean, covariance, keys = random_case(num_heads)
    given = torch.from_numpy(covariance).float() if use_covariance else None
    found = expected_attention_scores(
        torch.from_numpy(mean).float(), given, torch.from_numpy(keys).float(), 0.4
    )
    expected = loops(mean, covariance if use_covariance else None, keys, 0.4)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-8)


def test_ratios_are_those_of_drawn_queries() -> None:
    """E[exp(q.k s)] of 400,000 normal queries: the two terms are the right ones."""
    mean, covariance, keys = random_case(2)
    queries = np.random.default_rng(0).multivariate_normal(mean[0], covariance[0], 400_000)
    drawn = np.exp(queries @ keys[0].T * 0.2).mean(axis=0)
    found = expected_attention_scores(
        torch.from_numpy(mean).float(),
        torch.from_numpy(covariance).float(),
        torch.from_numpy(keys).float(),
        0.2,
    )
    np.testing.assert_allclose(found[0].numpy(), drawn / drawn.sum(), rtol=0.02)


def test_large_logits_and_no_keys_stay_finite() -> None:
    mean, keys = torch.full((2, 12), 100.0), torch.full((1, 5, 12), 100.0)
    covariance = torch.eye(12).expand(2, 12, 12) * 100
    assert expected_attention_scores(mean, covariance, keys, 0.3).isfinite().all()
    assert expected_attention_scores(mean, covariance, keys[:, :0], 0.3).shape == (1, 0)


def test_refuses_heads_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        expected_attention_scores(torch.zeros(3, 4), None, torch.zeros(2, 5, 4), 1.0)

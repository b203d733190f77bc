"""Soft caps and learned sinks in formulas that have no kernel, against plain float64 arithmetic."""

import numpy as np
import pytest
import torch

from tests.kernels.formulas.test_expected_attention import random_case
from vllm_kvcompress.kernels.formulas.expected_attention import expected_attention_scores
from vllm_kvcompress.kernels.formulas.layer_preference import layer_preference
from vllm_kvcompress.kernels.formulas.softmax_terms import SoftmaxTerms

SINKS = np.array([1.5, -3.0, 0.0, 4.0])
CASES = pytest.mark.parametrize(
    ("cap", "has_sinks"), [(2.0, False), (0.0, True), (1.2, True)], ids=["cap", "sinks", "both"]
)


def terms_of(cap: float, has_sinks: bool) -> SoftmaxTerms:
    return SoftmaxTerms(cap, torch.from_numpy(SINKS).float() if has_sinks else None)


def expectation(mean: float, variance: float, cap: float) -> float:
    """E[exp(capped x)] for a normal x, by a sum over a million points."""
    if variance == 0:
        return float(np.exp(cap * np.tanh(mean / cap) if cap else mean))
    at = np.linspace(-10, 10, 1_000_001)
    x = mean + np.sqrt(variance) * at
    density = np.exp(-(at**2) / 2) / np.sqrt(2 * np.pi)
    return float((np.exp(cap * np.tanh(x / cap) if cap else x) * density).sum() * (at[1] - at[0]))


@CASES
@pytest.mark.parametrize("use_covariance", [True, False])
def test_expected_attention(cap: float, has_sinks: bool, use_covariance: bool) -> None:
    mean, covariance, keys = random_case(4)
    keys, scale = keys[:, :7], 0.4
    given = torch.from_numpy(covariance).float() if use_covariance else None
    found = expected_attention_scores(
        torch.from_numpy(mean).float(), given, torch.from_numpy(keys).float(), scale,
        terms_of(cap, has_sinks),
    )  # fmt: skip
    expected = np.zeros(keys.shape[:2])
    for head in range(4):
        weights = []
        for key in keys[head // 2]:
            spread = scale**2 * key @ covariance[head] @ key if use_covariance else 0.0
            weights.append(expectation(scale * mean[head] @ key, spread, cap))
        total = sum(weights) + (np.exp(SINKS[head]) if has_sinks else 0.0)
        expected[head // 2] += np.array(weights) / total / 2
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("variance", [0.0, 1.0, 100.0, 800.0])
@pytest.mark.parametrize("mean", [-60.0, 0.0, 20.0, 120.0])
def test_the_quadrature_at_gemmas_cap(mean: float, variance: float) -> None:
    """Cap 50, deviations up to 28: of expectations like e^40, the logarithm to 0.01."""
    from vllm_kvcompress.kernels.formulas.expected_attention import _capped

    found = _capped(torch.tensor([mean]), torch.tensor([variance]), SoftmaxTerms(50.0))
    assert abs(float(found) - np.log(expectation(mean, variance, 50.0))) < 0.01


@CASES
def test_layer_preference(cap: float, has_sinks: bool) -> None:
    rng = np.random.default_rng(0)
    queries, keys = rng.standard_normal((4, 3, 8)), rng.standard_normal((2, 20, 8))
    entropy, variance = [], []
    for head in range(4):
        rows = np.zeros((3, 20))
        for i in range(3):
            logits = 0.5 * keys[head // 2, : 18 + i] @ queries[head, i]
            weights = np.exp(cap * np.tanh(logits / cap) if cap else logits)
            total = weights.sum() + (np.exp(SINKS[head]) if has_sinks else 0.0)
            rows[i, : 18 + i] = weights / total
        entropy.append(-sum(a * np.log(a) for a in rows.flatten() if a) / 3)
        variance.append(rows.var(axis=0, ddof=1).sum())
    found = layer_preference(
        torch.from_numpy(queries).float(), torch.from_numpy(keys).float(), 0.5,
        terms=terms_of(cap, has_sinks),
    )  # fmt: skip
    assert float(found) == pytest.approx(np.mean(entropy) * np.mean(variance), rel=1e-4)

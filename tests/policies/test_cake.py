"""CAKE against loops in float64."""

import numpy as np
import pytest

from tests.policies.helpers import attention_by_loops, make_inputs
from vllm_kvcompress.policies.cake import CAKE


@pytest.mark.parametrize("gamma", [0.0, 200.0])
@pytest.mark.parametrize("kernel_size", [1, 5, 13])
@pytest.mark.parametrize(("num_tokens", "window"), [(150, 16), (150, 2), (17, 16), (33, 32)])
def test_is_mean_plus_gamma_variance_pooled(
    gamma: float, kernel_size: int, num_tokens: int, window: int
) -> None:
    given = make_inputs(num_tokens, window)
    attention = attention_by_loops(given)
    past, half = num_tokens - window, kernel_size // 2
    indicator = np.zeros((8, num_tokens))
    for head in range(8):
        for token in range(num_tokens):
            column = attention[head, :, token]
            mean = column.sum() / window
            variance = ((column - mean) ** 2).sum() / (window - 1)
            indicator[head, token] = mean + gamma * variance
    expected = np.zeros((2, past))
    for head in range(8):  # pooled per query head, as the paper has it; the order does not matter
        for token in range(past):
            near = indicator[head, max(token - half, 0) : min(token + half + 1, past)]
            expected[head // 4, token] += near.sum() / kernel_size / 4
    found = CAKE(gamma=gamma, kernel_size=kernel_size).score(given)
    assert found.isfinite().all()
    np.testing.assert_allclose(found[:, :past].numpy(), expected, rtol=1e-4, atol=1e-8)


def test_one_query_has_no_variance() -> None:
    given = make_inputs(window=1)
    expected = attention_by_loops(given)[:, 0].reshape(2, 4, 150).mean(axis=1)
    found = CAKE(kernel_size=1).score(given)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-8)

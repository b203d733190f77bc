"""Merged mean and covariance against numpy on all vectors at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.kernels.formulas.query_statistics import QueryStatistics


def merged(vectors: torch.Tensor, sizes: list[int]) -> QueryStatistics:
    parts = [QueryStatistics.of(part) for part in vectors.split(sizes, dim=1)]
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def assert_matches(found: QueryStatistics, vectors: torch.Tensor) -> None:
    exact = vectors.double().numpy()
    assert found.count == exact.shape[1]
    np.testing.assert_allclose(found.mean.numpy(), exact.mean(axis=1), rtol=1e-5, atol=1e-5)
    for head in range(exact.shape[0]):
        expected = np.cov(exact[head].T, bias=True)
        np.testing.assert_allclose(found.covariance[head].numpy(), expected, rtol=1e-3, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0))
def test_any_chunks_give_the_statistics_of_all_vectors(sizes: list[int]) -> None:
    vectors = torch.randn(3, sum(sizes), 8, generator=torch.Generator().manual_seed(1)) + 2
    assert_matches(merged(vectors, sizes), vectors)


def test_a_mean_far_from_zero_does_not_drown_the_spread() -> None:
    """E[q q^T] - mean mean^T in float32 would be wrong by about 0.1 here."""
    vectors = torch.randn(2, 600, 8, generator=torch.Generator().manual_seed(2)) + 1000
    assert_matches(merged(vectors, [64] * 9 + [24]), vectors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_vectors_are_summed_in_float32(dtype: torch.dtype) -> None:
    vectors = torch.randn(2, 3000, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert_matches(merged(vectors, [1000] * 3), vectors)


def test_no_vectors_are_zeros() -> None:
    found = QueryStatistics.of(torch.zeros(2, 0, 4)).merge(QueryStatistics.of(torch.zeros(2, 0, 4)))
    assert found.count == 0
    assert not found.mean.any()
    assert not found.covariance.any()

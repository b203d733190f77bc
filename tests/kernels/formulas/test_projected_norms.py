"""Norms of projected values against loops in float64."""

import numpy as np
import pytest
import torch

from vllm_kvcompress.kernels.formulas import projected_norms as module
from vllm_kvcompress.kernels.formulas.projected_norms import projected_value_norms


def loops(values: np.ndarray, projection: np.ndarray) -> np.ndarray:
    group = len(projection) // len(values)
    result = np.zeros(values.shape[:2])
    for head, weight in enumerate(projection):
        for token, value in enumerate(values[head // group]):
            result[head // group, token] += np.abs(weight @ value).sum() / group
    return result


@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (4, 4)])
@pytest.mark.parametrize("num_tokens", [1, 63, 111])
def test_matches_loops(heads: tuple[int, int], num_tokens: int) -> None:
    rng = np.random.default_rng(num_tokens)
    values = rng.standard_normal((heads[1], num_tokens, 16))
    projection = rng.standard_normal((heads[0], 40, 16))
    found = projected_value_norms(
        torch.from_numpy(values).float(), torch.from_numpy(projection).float()
    )
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), loops(values, projection), rtol=1e-5)


@pytest.mark.parametrize("elements", [1, 7 * 160, 111 * 160])
def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 111, 16, generator=generator)
    projection = torch.randn(8, 40, 16, generator=generator)
    whole = projected_value_norms(values, projection)
    monkeypatch.setattr(module, "PROJECTED_AT_ONCE", elements)
    torch.testing.assert_close(projected_value_norms(values, projection), whole)


def test_bfloat16_stays_near_float64_and_reads_only() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 50, 64, generator=generator).bfloat16()
    projection = torch.randn(8, 512, 64, generator=generator).bfloat16()
    before = values.clone(), projection.clone()
    found = projected_value_norms(values, projection)
    expected = loops(values.double().numpy(), projection.double().numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3)
    assert torch.equal(values, before[0])
    assert torch.equal(projection, before[1])


def test_refuses_heads_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        projected_value_norms(torch.zeros(2, 5, 4), torch.zeros(3, 8, 4))

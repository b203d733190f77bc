"""Key redundancy against loops in float64."""

import numpy as np
import pytest
import torch

from vllm_kvcompress.kernels import key_redundancy as module
from vllm_kvcompress.kernels.key_redundancy import key_redundancy


def loops(keys: np.ndarray, threshold: float) -> np.ndarray:
    result = np.zeros(keys.shape[:2])
    for kv, rows in enumerate(keys):
        for i, row in enumerate(rows):
            cosines = [
                0.0 if i == j else row @ other / np.linalg.norm(row) / np.linalg.norm(other)
                for j, other in enumerate(rows)
            ]
            similar = [j for j, cosine in enumerate(cosines) if cosine > threshold]
            cosines[max(similar, default=0)] = 0.0
            result[kv] += np.array(cosines) / len(rows)
    return result


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 63, 64, 65])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.99])
def test_matches_loops(num_tokens: int, threshold: float) -> None:
    keys = np.random.default_rng(num_tokens).standard_normal((3, num_tokens, 24)) + 0.3
    found = key_redundancy(torch.from_numpy(keys).float(), threshold)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), loops(keys, threshold), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("elements", [1, 3 * 50 * 7, 3 * 50 * 50])
def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    keys = torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(0))
    whole = key_redundancy(keys, 0.2)
    monkeypatch.setattr(module, "_ELEMENTS", elements)
    torch.testing.assert_close(key_redundancy(keys, 0.2), whole)


def test_a_zero_key_is_like_nothing() -> None:
    keys = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    keys[0, 5] = 0
    found = key_redundancy(keys, 0.5)
    assert found.isfinite().all()
    assert found[0, 5] == 0

"""Tokens to rows, against numpy's repeat."""

import numpy as np
import pytest
import torch

from vllm_kvcompress.kernels.batch_rows import batch_rows


@pytest.mark.parametrize("counts", [[1], [3, 1, 4], [2, 0, 5], [1] * 9])
def test_every_token_finds_its_row(counts: list[int]) -> None:
    starts = np.concatenate([[0], np.cumsum(counts)])
    padded = torch.tensor([*starts, starts[-1], starts[-1]], dtype=torch.int32)
    found = batch_rows(padded, len(counts), int(starts[-1]))
    assert found.tolist() == np.repeat(np.arange(len(counts)), counts).tolist()

"""SnapKV against loops in float64."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.policies.helpers import attention_by_loops, make_inputs
from vllm_kvcompress.policies.inputs import Queries
from vllm_kvcompress.policies.snapkv import SnapKV


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("kernel_size", [1, 5, 7, 13])
@pytest.mark.parametrize("num_tokens", [17, 20, 150])
def test_pools_the_attention_of_the_window(pooling: str, kernel_size: int, num_tokens: int) -> None:
    given = make_inputs(num_tokens)
    attention = attention_by_loops(given).mean(axis=1).reshape(2, 4, num_tokens).mean(axis=1)
    past, half = num_tokens - 16, kernel_size // 2
    expected = np.zeros((2, past))
    for head in range(2):
        for token in range(past):
            near = attention[head, max(token - half, 0) : min(token + half + 1, past)]
            expected[head, token] = near.max() if pooling == "max" else near.sum() / kernel_size
    found = SnapKV(pooling=pooling, kernel_size=kernel_size).score(given)
    np.testing.assert_allclose(found[:, :past].numpy(), expected, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(found[:, past:].numpy(), attention[:, past:], rtol=1e-4, atol=1e-8)


def test_reads_the_window_and_refuses_an_even_kernel() -> None:
    assert SnapKV().queries is Queries.WINDOW
    with pytest.raises(ValidationError, match="must be odd"):
        SnapKV(kernel_size=4)
    with pytest.raises(ValidationError, match="pooling"):
        SnapKV(pooling="median")


def test_bfloat16_keys_and_queries() -> None:
    given = make_inputs()
    assert given.queries is not None
    low = make_inputs(keys=given.keys.bfloat16(), queries=given.queries.bfloat16())
    high = make_inputs(keys=low.keys.float(), queries=given.queries.bfloat16().float())
    torch.testing.assert_close(SnapKV().score(low), SnapKV().score(high))

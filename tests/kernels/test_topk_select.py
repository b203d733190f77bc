"""Selection against Python's sort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.kernels.compact_pages import gather_rows
from vllm_kvcompress.kernels.topk_select import select_tokens


def by_sorting(scores: list[float], forced: set[int], num_keep: int) -> list[int]:
    """Forced first, then higher scores, then earlier tokens."""
    order = sorted(range(len(scores)), key=lambda i: (i not in forced, -scores[i], i))
    return sorted(order[:num_keep])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_matches_sorting(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 70))
    # Few distinct values: ties are the interesting case.
    scores = data.draw(
        st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=length, max_size=length)
    )
    num_keep = data.draw(st.integers(1, length))
    forced = data.draw(st.sets(st.integers(0, length - 1), max_size=num_keep))
    mask = torch.zeros(length, dtype=torch.bool)
    mask[list(forced)] = True
    found = select_tokens(torch.tensor([scores, scores]), mask, num_keep)
    assert found.tolist() == [by_sorting(scores, forced, num_keep)] * 2


def test_nan_is_worth_nothing_and_infinity_does_not_beat_forced_tokens() -> None:
    scores = torch.tensor([[float("nan"), float("inf"), 1.0, 0.0]])
    forced = torch.tensor([False, False, False, True])
    assert select_tokens(scores, forced, 2).tolist() == [[1, 3]]
    assert select_tokens(scores, forced, 3).tolist() == [[1, 2, 3]]
    assert select_tokens(scores, forced, 1).tolist() == [[3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gather_copies_bit_for_bit(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 50, 8).to(dtype)
    indices = torch.stack([torch.randperm(50)[:7].sort().values for _ in range(3)])
    found = gather_rows(rows, indices)
    expected = np.stack([rows.view(3, 50, 8)[h][indices[h]].float().numpy() for h in range(3)])
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.float().numpy(), expected)

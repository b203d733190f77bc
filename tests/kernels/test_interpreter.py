"""What Triton's interpreter must take because compiled Triton does."""

import torch
import triton
import triton.language as tl


@triton.jit
def _largest_kernel(values, out, N: tl.constexpr):
    row = tl.program_id(0)
    loaded = tl.load(values + row * N + tl.arange(0, N))
    value, index = tl.max(loaded, axis=0, return_indices=True)
    tl.store(out + row, index)


def test_a_row_without_numbers_has_an_index() -> None:
    values = torch.tensor([[1.0, 5.0, 2.0, 0.0], [float("nan")] * 4, [float("nan"), 1.0, 7.0, 2.0]])
    out = torch.full((3,), -1, dtype=torch.int32)
    _largest_kernel[(3,)](values, out, N=4)
    assert out.tolist()[0] == 1 and out.tolist()[2] == 2
    assert 0 <= out.tolist()[1] < 4

"""Scatter of rows: the kernel and its torch version against a loop."""

import numpy as np
import pytest
import torch

from tests.kernels.paged import DEVICE
from vllm_kvcompress.kernels import torch_backend as torch_version
from vllm_kvcompress.kernels.cache import store_rows as kernel

VERSIONS = pytest.mark.parametrize("module", [kernel, torch_version], ids=["triton", "torch"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def random_rows(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def check(module, rows: torch.Tensor, slots: list[int], num_slots: int) -> None:
    """In place, bit for bit, and nothing else is touched."""
    out = random_rows(num_slots + 2, *rows.shape[1:], dtype=rows.dtype, seed=9)
    expected = out.clone()
    for token in range(rows.shape[0]):
        if slots[token] >= 0:
            expected[1 + slots[token]] = rows[token]
    address = out.data_ptr()
    module.store_rows(rows, torch.tensor(slots, device=DEVICE), out[1:-1])
    assert out.data_ptr() == address
    assert torch.equal(bits(out), bits(expected))


@VERSIONS
@DTYPES
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_dtypes_and_head_dims(module, head_dim: int, dtype: torch.dtype) -> None:
    rows = random_rows(5, 3, head_dim, dtype=dtype)
    check(module, rows, [4, -1, 0, -1, 7, 3], 8)  # one slot more than rows


@VERSIONS
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 63])
@pytest.mark.parametrize("num_heads", [1, 8, 32])
def test_ragged_edges(module, num_tokens: int, num_heads: int) -> None:
    """Rows of several programs; tokens around the edge of a program."""
    generator = torch.Generator().manual_seed(num_tokens)
    slots = torch.randperm(2 * num_tokens, generator=generator)[:num_tokens] - num_tokens // 2
    slots = [slot if slot >= 0 else -1 for slot in slots.tolist()] + [0, 1]
    check(module, random_rows(num_tokens, num_heads, 64), slots, 2 * num_tokens)


@VERSIONS
def test_queries_may_be_a_slice_of_a_fused_projection(module) -> None:
    fused = random_rows(6, (4 + 2 * 2) * 64)
    slots = [0, -1, 1, 2, -1, 3]
    check(module, fused[:, : 4 * 64].view(6, 4, 64), slots, 4)
    check(module, fused[:, 4 * 64 : 6 * 64].view(6, 2, 64), slots, 4)
    check(module, fused.view(6, 8, 64)[:, ::2], slots, 4)  # heads apart
    check(module, fused.view(6, 4, 128)[..., 3:99], slots, 4)  # not aligned
    check(module, random_rows(4, 6, 64).transpose(0, 1), slots, 4)  # heads outermost


@VERSIONS
def test_tokens_without_a_slot_change_nothing(module) -> None:
    check(module, random_rows(40, 2, 64), [-1] * 40, 3)
    check(module, random_rows(0, 2, 64), [1], 3)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs a view past the end of its storage")
@VERSIONS
def test_rows_without_a_slot_are_not_read(module) -> None:
    """All rows but the first lie 256 GiB apart: reading one would end the process."""
    row = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    far = np.lib.stride_tricks.as_strided(row, (40, 2, 64), (2**38, 256, 4))
    out = torch.zeros(3, 2, 64)
    module.store_rows(torch.from_numpy(far), torch.tensor([2] + [-1] * 39), out)
    assert np.array_equal(out[2], row) and not out[:2].any()


def test_nan_payloads_survive() -> None:
    rows = torch.full((1, 1, 64), 0x7FC1, dtype=torch.int16, device=DEVICE).view(torch.bfloat16)
    check(kernel, rows, [0], 1)


@VERSIONS
def test_refuses_what_does_not_fit(module) -> None:
    rows, slots = random_rows(3, 2, 64), torch.tensor([0, 1, 2], device=DEVICE)
    with pytest.raises(ValueError, match="do not fit"):
        module.store_rows(rows, slots, random_rows(4, 2, 32))
    with pytest.raises(ValueError, match="do not fit"):
        module.store_rows(rows, slots, random_rows(4, 2, 64).half())
    with pytest.raises(ValueError, match="3 rows, but 2 slots"):
        module.store_rows(rows, slots[:2], random_rows(4, 2, 64))
    with pytest.raises(ValueError, match="neighbours"):
        module.store_rows(random_rows(3, 2, 128)[..., ::2], slots, random_rows(4, 2, 64))
    with pytest.raises(ValueError, match="out contiguous"):
        module.store_rows(rows, slots, random_rows(2, 4, 64).transpose(0, 1))


def sm90_launches() -> None:
    """Llama-3-8B's queries, a slice of the fused projection; the widest type; odd head_dims."""
    slots = torch.zeros(64, dtype=torch.int64)
    for dtype, dim in [(torch.bfloat16, 128), (torch.float32, 128), (torch.bfloat16, 96)]:
        fused = torch.zeros(64, 48 * dim, dtype=dtype)
        rows = fused[:, : 32 * dim].view(64, 32, dim)
        kernel.store_rows(rows, slots, torch.zeros(256, 32, dim, dtype=dtype))

"""Kernels over caches of 8 bits: bytes that are moved, every float that there is, and compilation.

Each kernel's numbers in e4m3 and e5m2 are tested beside its other types.
"""

import pytest
import torch

from tests.kernels.compaction.test_compact_pages import Case, check_copy
from tests.kernels.compaction.test_compact_pages import kernel as compaction
from tests.kernels.paged import DEVICE, random_pages
from tests.kernels.scores.test_window import check_tokens, make_queries
from vllm_kvcompress.kernels.scores import heads, window

FLOATS = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_finite_byte_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    """Zeros of both signs and subnormal numbers among them."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()]
    numbers = numbers[numbers.abs() < 2**9]  # larger ones of e5m2 leave one token's softmax 1
    numbers = torch.cat([numbers, numbers.new_zeros(-len(numbers) % 32)])
    pages, _, _ = random_pages([len(numbers) // 32], 1, 32, dtype=dtype, key_scale=0.37)
    rows = numbers.view(1, -1, 32).to(dtype)
    block = int(pages.block_table[0, 0])
    pages.keys[block, :, : rows.shape[1]] = rows.to(DEVICE)
    queries = make_queries(1, 1, 2, 32, torch.bfloat16)
    keys = [rows.double() * 0.37]
    check_tokens(window, queries, pages, keys, scale=0.01, rtol=1e-4)


@pytest.mark.parametrize("layout", ["LBHNC", "BHLNC"])
def test_bytes_are_moved_whatever_they_stand_for(layout: str) -> None:
    """Not-a-numbers too, of both formats, which no copy of floats may make alike."""
    case = Case([70, 100], [16, 40], dtype=torch.uint8, layout=layout)
    generator = torch.Generator().manual_seed(3)
    for cache in case.caches:
        cache.copy_(torch.randint(256, cache.shape, generator=generator, dtype=torch.uint8))
    check_copy(compaction, case)


def sm90_launches() -> None:
    """Llama-3-8B's shapes, and the widest rows; GPUs store e4m3."""
    for num_heads, head_dim in [(32, 128), (8, 256)]:
        kind = torch.float8_e4m3fn
        pages, _, _ = random_pages([64], 8, head_dim, dtype=kind, key_scale=0.37)
        queries = make_queries(1, 32, num_heads, head_dim, torch.bfloat16)
        window.token_scores(queries, pages, 0.1)
        window.window_scores(queries, pages, 0.1, 32)
        heads.head_scores(queries, pages, 0.1)
        case = Case([64], [32], num_kv_heads=8, head_dim=head_dim, dtype=torch.uint8)
        case.run(compaction)

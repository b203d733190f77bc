"""Layouts of the latent cache (MLA) [blocks, 1, N, L + P]: read, written, moved and measured."""

from collections.abc import Callable

import pytest
import torch

from tests.kernels.paged import DEVICE, make_cache
from vllm_kvcompress.plans import CompactionPlan, GroupCache, GroupLengths, GroupPlan
from vllm_kvcompress.worker.batch import CompactionJob, group_batches
from vllm_kvcompress.worker.layout.base import CacheLayout
from vllm_kvcompress.worker.layout.latent import GatheredLatentLayout, LatentLayout, absorb

LATENT, ROTATED, NOPE, HEADS, BLOCK = 32, 16, 8, 4, 32
WIDTH = LATENT + ROTATED
UP = torch.randn(HEADS, NOPE, LATENT, generator=torch.Generator().manual_seed(3)).to(DEVICE)


def absorbed(query: torch.Tensor) -> torch.Tensor:
    return absorb(query, UP)


Make = Callable[[], CacheLayout]
LAYOUTS: dict[str, tuple[Make, int]] = {
    "in place": (lambda: LatentLayout(WIDTH, LATENT, BLOCK, absorbed), BLOCK),
    "in place, smaller blocks": (lambda: LatentLayout(WIDTH, LATENT, BLOCK, absorbed), 16),
    "gathered": (lambda: GatheredLatentLayout(LATENT, absorbed), BLOCK),
}


@pytest.fixture(params=LAYOUTS)
def laid(request: pytest.FixtureRequest) -> tuple[CacheLayout, list[torch.Tensor]]:
    """A layout, and caches of two layers that are all NaN."""
    make, kernel_block = LAYOUTS[request.param]
    return make(), make_cache(8 * BLOCK // kernel_block, 1, kernel_block, WIDTH, torch.float32)


def rows_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def flat(cache: torch.Tensor) -> torch.Tensor:
    """Rows [slots, WIDTH] of all blocks, in the table's order."""
    return cache[:, 0].reshape(-1, WIDTH)


def test_a_row_is_a_key_and_its_first_part_the_value(laid) -> None:
    layout, (cache, _) = laid
    rows, blocks = rows_of(2 * BLOCK), torch.tensor([3, 1], device=DEVICE)
    layout.write(cache, blocks, rows, rows[..., :LATENT])
    keys, values = layout.read(cache, blocks)
    assert torch.equal(keys, rows) and torch.equal(values, rows[..., :LATENT])
    assert torch.equal(flat(cache)[3 * BLOCK : 4 * BLOCK], rows[0, :BLOCK])
    kept = torch.ones(8, dtype=torch.bool)
    kept[[1, 3]] = False
    assert flat(cache).unflatten(0, (8, BLOCK))[kept].isnan().all()


def test_queries_are_absorbed_before_they_attend(laid) -> None:
    """Against every head's own keys, in float64."""
    layout, (cache, _) = laid
    count, window = 50, 6
    rows, blocks = rows_of(2 * BLOCK), torch.tensor([2, 5], device=DEVICE)
    layout.write(cache, blocks, rows, rows[..., :LATENT])
    query = torch.randn(HEADS, window, NOPE + ROTATED, generator=torch.Generator().manual_seed(1))
    found = layout.rows_so_far(cache, blocks.int(), count, query.to(DEVICE), 0.2)
    own, total = rows[0, :count].cpu().double(), torch.zeros(count, dtype=torch.float64)
    for head in range(HEADS):
        keys = torch.cat([own[:, :LATENT] @ UP[head].cpu().double().T, own[:, LATENT:]], dim=1)
        logits = query[head].double() @ keys.T * 0.2
        later = torch.arange(count) > torch.arange(count - window, count)[:, None]
        total += logits.masked_fill(later, -torch.inf).softmax(1).sum(0) / (HEADS * window)
    attention = found.attention(window)
    assert attention.shape == (1, count)
    torch.testing.assert_close(attention[0].cpu().double(), total, rtol=1e-4, atol=1e-7)
    assert found.queries is not None and found.queries.shape == (HEADS, window, WIDTH)


def test_survivors_are_moved_bit_for_bit_in_all_layers(laid) -> None:
    layout, caches = laid
    source, target, tail = (4, 0), (6,), (7,)
    rows = [rows_of(3 * BLOCK, seed) for seed in (5, 6)]
    for cache, own in zip(caches, rows, strict=True):
        layout.write(cache, torch.tensor([*source, *tail], device=DEVICE), own, own[..., :LATENT])
    lengths = GroupLengths(2 * BLOCK, BLOCK)
    plan = GroupPlan(lengths, GroupCache(3 * BLOCK, ((0, 4),)), ((0, 4),), source, target, tail)
    job = CompactionJob(CompactionPlan("a", 3 * BLOCK, False, 0, (plan,)), None, 0)  # type: ignore[arg-type]
    addresses = {0: [cache.data_ptr() for cache in caches]}
    (batch,) = group_batches([job], addresses, torch.device(DEVICE)).values()
    kept = torch.stack([torch.arange(0, 64, 2), torch.arange(1, 64, 2)])[:, None, None].to(DEVICE)
    before = [flat(cache).clone() for cache in caches]
    layout.move(caches, batch, kept.contiguous(), None)
    for cache, own, indices, old in zip(caches, rows, kept, before, strict=True):
        moved = flat(cache)[6 * BLOCK : 7 * BLOCK]
        assert torch.equal(moved, own[0, indices[0, 0]])
        rest = torch.cat([flat(cache)[: 6 * BLOCK], flat(cache)[7 * BLOCK :]])
        assert torch.equal(
            rest.nan_to_num(nan=-7.0),
            torch.cat([old[: 6 * BLOCK], old[7 * BLOCK :]]).nan_to_num(nan=-7.0),
        ), "sources are only read"

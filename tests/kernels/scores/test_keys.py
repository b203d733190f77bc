"""Scores without queries over paged caches: kernels and torch versions against float64 loops."""

import math
from dataclasses import replace

import pytest
import torch

from tests.kernels import torch_versions as torch_version
from tests.kernels.paged import DEVICE, LAYOUTS, nan_empty, random_pages
from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.scores import keys as kernel

VERSIONS = pytest.mark.parametrize("module", [kernel, torch_version], ids=["triton", "torch"])
Rows = list[torch.Tensor]  # per request [KV, n, D] float64


@pytest.fixture(autouse=True)
def _poison(monkeypatch) -> None:
    nan_empty(monkeypatch)


def cosines(rows: torch.Tensor) -> torch.Tensor:
    """[n] of one head's keys [n, D]."""
    anchor = torch.zeros(rows.shape[1], dtype=torch.float64)
    for row in rows:
        anchor += row / max(row.norm().item(), 1e-12) / len(rows)
    found = torch.zeros(len(rows), dtype=torch.float64)
    for token, row in enumerate(rows):
        norms = max(row.norm().item(), 1e-8) * max(anchor.norm().item(), 1e-8)
        found[token] = torch.dot(row, anchor) / norms
    return found


def lag_shares(rows: torch.Tensor, num_sinks: int, lag: int) -> torch.Tensor:
    """[n] of one head's keys or values [n, D]: block by block, token by token."""
    length, dim = rows.shape
    found = torch.zeros(length, dtype=torch.float64)
    start = num_sinks
    while start + 2 * lag <= length:
        following = rows[start + lag : start + 2 * lag]
        low, high = following.min(0).values, following.max(0).values
        spreads = []
        for token in range(start, start + lag):
            scaled = (rows[token] - low) / torch.clamp(high - low, min=1e-6)
            spreads.append(math.sqrt(((scaled - scaled.mean()) ** 2).sum().item() / (dim - 1)))
        weights = [math.exp(spread - max(spreads)) for spread in spreads]
        found[start : start + lag] = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        start += lag
    return found


def compare(found: torch.Tensor, expected: Rows, rtol: float) -> None:
    """Each request's [KV, n], and zeros behind it."""
    assert found.dtype == torch.float32
    assert found.shape[2] == max(scores.shape[1] for scores in expected)
    for request, scores in enumerate(expected):
        length = scores.shape[1]
        got = found[request].cpu().double()
        torch.testing.assert_close(got[:, :length], scores, rtol=rtol, atol=2e-7)
        assert (got[:, length:] == 0).all(), "padding is zero"


def check_similarity(module, pages: Pages, keys: Rows, rtol: float = 1e-5) -> None:
    expected = [torch.stack([cosines(head) for head in rows]) for rows in keys]
    compare(module.key_similarity(pages), expected, rtol)


def check_lag(
    module, pages: Pages, keys: Rows, values: Rows, num_sinks: int, lag: int, rtol: float = 2e-5
) -> None:
    expected = []
    for request_keys, request_values in zip(keys, values, strict=True):
        heads = []
        for key_head, value_head in zip(request_keys, request_values, strict=True):
            shares = lag_shares(key_head, num_sinks, lag) + lag_shares(value_head, num_sinks, lag)
            heads.append(shares / 2)
        expected.append(torch.stack(heads))
    compare(module.lag_scores(pages, num_sinks, lag), expected, rtol)


@VERSIONS
@pytest.mark.parametrize(
    ("lengths", "lag"),
    [([1], 2), ([5, 300, 15], 70), ([16, 17], 5), ([129, 128, 127], 61), ([33, 63, 111], 16)],
)
def test_ragged_batches_around_the_edges(module, lengths: list[int], lag: int) -> None:
    pages, keys, values = random_pages(lengths, head_dim=32)
    check_similarity(module, pages, keys)
    check_lag(module, pages, keys, values, 4, lag)


@VERSIONS
@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim"), [(1, 64), (2, 96), (3, 128), (2, 256), (8, 64)]
)
def test_head_shapes(module, num_kv_heads: int, head_dim: int) -> None:
    pages, keys, values = random_pages([40, 70], num_kv_heads, head_dim)
    check_similarity(module, pages, keys)
    check_lag(module, pages, keys, values, 3, 23)


@VERSIONS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_physical_layouts(module, layout: str, block_size: int) -> None:
    pages, keys, values = random_pages([100, 31], block_size=block_size, layout=layout, head_dim=32)
    check_similarity(module, pages, keys)
    check_lag(module, pages, keys, values, 2, 34)


@VERSIONS
def test_keys_and_values_may_lie_in_different_storage(module) -> None:
    pages, keys, values = random_pages([50, 31], layout="BLNHC", head_dim=32)
    pages = replace(pages, values=pages.values.contiguous())
    check_lag(module, pages, keys, values, 1, 16)


@VERSIONS
@pytest.mark.parametrize(
    ("dtype", "key_scale", "value_scale"),
    [
        (torch.bfloat16, 1.0, 1.0),
        (torch.float16, 1.0, 1.0),
        (torch.float8_e4m3fn, 0.37, 2.5),
        (torch.float8_e5m2, 2.5, 0.37),
        # Ranges fall on both sides of the smallest one: scales change what the clamp does.
        (torch.float8_e4m3fn, 3e-7, 1e-7),
        (torch.float8_e5m2, 1e-7, 3e-7),
    ],
)
def test_dtypes_and_scales(module, dtype, key_scale: float, value_scale: float) -> None:
    pages, keys, values = random_pages(
        [90, 33], dtype=dtype, key_scale=key_scale, value_scale=value_scale
    )
    check_lag(module, pages, keys, values, 4, 25)
    if key_scale > 1e-3:
        check_similarity(module, pages, keys)


@VERSIONS
def test_only_8_bit_caches_are_scaled(module) -> None:
    pages, keys, values = random_pages([40], dtype=torch.float8_e4m3fn)
    scaled = replace(pages, key_scale=1e-7, value_scale=1e-7)
    assert not torch.equal(module.lag_scores(scaled, 0, 8), module.lag_scores(pages, 0, 8))
    wide, _, _ = random_pages([40], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="only 8-bit caches are scaled"):
        replace(wide, key_scale=2.0)


@VERSIONS
@pytest.mark.parametrize(("num_sinks", "lag"), [(0, 2), (1, 16), (4, 7), (21, 37), (0, 37)])
def test_lag_blocks_cut_across_cache_blocks(module, num_sinks: int, lag: int) -> None:
    """Lengths on both sides of a second and a third full block, and inside the sinks."""
    second, third = num_sinks + 2 * lag, num_sinks + 3 * lag
    lengths = [second - 1, second, third - 1, third, max(num_sinks, 1)]
    pages, keys, values = random_pages(lengths, 1, 32)
    check_lag(module, pages, keys, values, num_sinks, lag)


@VERSIONS
@pytest.mark.parametrize("lag", [128, 129, 300])
def test_lag_blocks_as_long_as_a_tile_and_longer(module, lag: int) -> None:
    pages, keys, values = random_pages([3 * lag + 9, 2 * lag + 3], 1, 128)
    check_lag(module, pages, keys, values, 4, lag)


@VERSIONS
@pytest.mark.parametrize(("num_sinks", "lag"), [(4, 500), (4, 2_000_000_000), (700, 8)])
def test_too_short_for_any_comparison(module, num_sinks: int, lag: int) -> None:
    pages, _, _ = random_pages([40, 7])
    found = module.lag_scores(pages, num_sinks, lag)
    assert found.shape == (2, 2, 40)
    assert (found == 0).all()


@VERSIONS
def test_a_peak_in_one_tile_silences_the_others(module) -> None:
    """Spreads far above what exp takes, first in the last tile of a block, then in the first."""
    pages, keys, values = random_pages([660], 1, 64)
    for cache, rows, token in [(pages.keys, keys, 290), (pages.values, values, 10)]:
        loud = torch.linspace(-900, 900, 64)
        slot = pages.block_table[0, token // 16], 0, token % 16
        cache[slot] = loud.to(DEVICE)
        rows[0][0, token] = loud.double()
    check_lag(module, pages, keys, values, 0, 300)
    found = module.lag_scores(pages, 0, 300)
    assert found[0, 0, 290].item() == pytest.approx(0.5)
    assert found[0, 0, 10].item() == pytest.approx(0.5)


@VERSIONS
def test_constant_blocks(module) -> None:
    """A channel that never changes is divided by the smallest range, not by zero."""
    pages, keys, values = random_pages([40], 1, 32)
    pages.keys.fill_(0.25)
    keys[0].fill_(0.25)
    check_lag(module, pages, keys, values, 0, 10)
    pages.values.fill_(-3.0)
    assert module.lag_scores(pages, 0, 10)[0, 0, :30] == pytest.approx([0.1] * 30)


@VERSIONS
def test_zero_and_tiny_keys(module) -> None:
    pages, keys, _ = random_pages([20, 1], 2, 32)
    for token, factor in [(3, 0.0), (7, 1e-10), (19, 1e-14)]:
        slot = pages.block_table[0, token // 16], slice(None), token % 16
        pages.keys[slot] *= factor
        keys[0][:, token] = pages.keys[slot].cpu().double()
    pages.keys[pages.block_table[1, 0], 0, 0] = 0  # the only key: the anchor is zero too
    keys[1][0, 0] = 0
    check_similarity(module, pages, keys)
    assert (module.key_similarity(pages)[0, :, 3] == 0).all()
    assert module.key_similarity(pages)[1, 0, 0] == 0


@VERSIONS
def test_a_request_without_tokens(module) -> None:
    pages, _, _ = random_pages([20, 20])
    lengths = torch.tensor([20, 0], dtype=torch.int32, device=DEVICE)
    table = torch.stack([pages.block_table[0], torch.full_like(pages.block_table[1], 10**8)])
    pages = replace(pages, num_tokens=lengths, block_table=table)
    assert (module.key_similarity(pages)[1] == 0).all()
    assert (module.lag_scores(pages, 0, 4)[1] == 0).all()


@pytest.mark.parametrize("programs", [8, 64])
def test_long_sequences_are_split(monkeypatch, programs: int) -> None:
    """Splits of several tiles, and a request that ends before most of the splits begin."""
    monkeypatch.setattr("vllm_kvcompress.kernels.common.TARGET_PROGRAMS", programs)
    pages, keys, _ = random_pages([700, 260, 1], 2, 32)
    check_similarity(kernel, pages, keys)


def test_keys_that_share_a_direction_stay_exact() -> None:
    """Cosines near 1, as after a large bias on some channels."""
    pages, keys, _ = random_pages([200], 1, 64)
    pages.keys[..., 5] += 50
    keys[0][..., 5] = (keys[0][..., 5].float() + 50).double()
    check_similarity(kernel, pages, keys, rtol=1e-6)


@VERSIONS
@pytest.mark.parametrize(("num_sinks", "lag"), [(-1, 8), (0, 1), (4, 0)])
def test_refuses_what_makes_no_blocks(module, num_sinks: int, lag: int) -> None:
    pages, _, _ = random_pages([20])
    with pytest.raises(ValueError, match=f"got {num_sinks} and {lag}"):
        module.lag_scores(pages, num_sinks, lag)


def sm90_launches() -> None:
    """Llama-3-8B's shapes; rows of 96 and 256 numbers and of 8 bits; short and long lag blocks."""
    for head_dim, dtype in [
        (128, torch.bfloat16),
        (96, torch.bfloat16),
        (256, torch.bfloat16),
        (128, torch.float8_e4m3fn),
        (64, torch.float32),
    ]:
        pages, _, _ = random_pages([64], 8, head_dim, dtype=dtype)
        pages = replace(pages, max_tokens=4096)  # nothing runs: only shapes matter
        kernel.key_similarity(pages)
        for lag in [8, 37, 128, 500]:
            kernel.lag_scores(pages, 4, lag)

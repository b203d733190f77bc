"""Window scores over paged keys: the kernel and its torch version against loops in float64."""

import pytest
import torch

from tests.kernels import torch_versions as torch_version
from tests.kernels.paged import DEVICE, LAYOUTS, nan_empty, random_pages
from vllm_kvcompress.kernels.scores import window as kernel

VERSIONS = pytest.mark.parametrize("module", [kernel, torch_version], ids=["triton", "torch"])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}


@pytest.fixture(autouse=True)
def _poison(monkeypatch) -> None:
    nan_empty(monkeypatch)


def make_queries(num_requests, window, num_heads, head_dim, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_requests, window, num_heads, head_dim)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def loops(queries: torch.Tensor, keys: list[torch.Tensor], scale: float) -> list[torch.Tensor]:
    """Per request [KV, n] float64: softmax row by row, then means over queries and heads."""
    found = []
    for rows, request_keys in zip(queries.double().cpu(), keys, strict=True):
        window, num_heads, _ = rows.shape
        num_kv_heads, length, _ = request_keys.shape
        group = num_heads // num_kv_heads
        scores = torch.zeros(num_kv_heads, length, dtype=torch.float64)
        for head in range(num_heads):
            for i in range(window):
                visible = length - window + i + 1
                logits = request_keys[head // group, :visible] @ rows[i, head] * scale
                scores[head // group, :visible] += logits.softmax(0) / (group * window)
        found.append(scores)
    return found


def check_tokens(module, queries, pages, keys, scale=0.3, rtol=2e-5) -> None:
    found = module.token_scores(queries, pages, scale).cpu().double()
    for request, expected in enumerate(loops(queries, keys, scale)):
        length = expected.shape[1]
        torch.testing.assert_close(found[request, :, :length], expected, rtol=rtol, atol=1e-7)
        assert (found[request, :, length:] == 0).all(), "padding is zero"


def check_windows(module, queries, pages, keys, size, scale=0.3, rtol=2e-5) -> None:
    found = module.window_scores(queries, pages, scale, size).cpu().double()
    assert found.shape[2] == -(-pages.max_tokens // size)
    for request, scores in enumerate(loops(queries, keys, scale)):
        review = scores.shape[1] - queries.shape[1]
        for window in range(found.shape[2]):
            tokens = scores[:, window * size : min((window + 1) * size, review)]
            expected = tokens.mean(1) if window * size < review else torch.zeros(len(scores))
            torch.testing.assert_close(
                found[request, :, window], expected.double(), rtol=rtol, atol=1e-7
            )


@VERSIONS
@pytest.mark.parametrize("lengths", [[4], [5, 300, 15], [16, 17], [129, 128, 127], [33, 63, 111]])
def test_ragged_batches_around_the_edges_of_blocks_and_tiles(module, lengths: list[int]) -> None:
    pages, keys, _ = random_pages(lengths)
    queries = make_queries(len(lengths), 4, 8, 64)
    check_tokens(module, queries, pages, keys)
    check_windows(module, queries, pages, keys, 16)


@VERSIONS
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (8, 1)], ids=["1:1", "4:1", "8:1"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_head_shapes(module, heads: tuple[int, int], head_dim: int) -> None:
    pages, keys, _ = random_pages([70, 41], heads[1], head_dim)
    queries = make_queries(2, 3, heads[0], head_dim)
    check_tokens(module, queries, pages, keys, head_dim**-0.5)
    check_windows(module, queries, pages, keys, 8, head_dim**-0.5)


@VERSIONS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_physical_layouts(module, layout: str, block_size: int) -> None:
    pages, keys, _ = random_pages([100, 31], block_size=block_size, layout=layout, head_dim=32)
    queries = make_queries(2, 2, 4, 32)
    check_tokens(module, queries, pages, keys)
    check_windows(module, queries, pages, keys, 32)


@VERSIONS
@pytest.mark.parametrize(
    ("query_dtype", "key_dtype", "key_scale"),
    [
        (torch.bfloat16, torch.bfloat16, 1.0),
        (torch.float16, torch.float16, 1.0),
        (torch.bfloat16, torch.float8_e4m3fn, 0.37),
        (torch.float16, torch.float8_e5m2, 2.5),
    ],
)
def test_dtypes(module, query_dtype, key_dtype, key_scale: float) -> None:
    pages, keys, _ = random_pages([90, 33], 2, 64, dtype=key_dtype, key_scale=key_scale)
    queries = make_queries(2, 4, 8, 64, query_dtype)
    rtol = TOLERANCE[query_dtype]
    check_tokens(module, queries, pages, keys, 64**-0.5, rtol)
    check_windows(module, queries, pages, keys, 16, 64**-0.5, rtol)


@pytest.mark.parametrize("size", [8, 64, 128, 256])
def test_windows_of_any_power_of_two_and_many_rows(size: int) -> None:
    """g * w = 160 rows take two tiles of rows; 256 tokens are more than a tile of keys."""
    pages, keys, _ = random_pages([530, 40], 1, 32)
    queries = make_queries(2, 20, 8, 32)
    check_windows(kernel, queries, pages, keys, size)
    check_tokens(kernel, queries, pages, keys)


def test_long_sequences_are_split_and_large_logits_stay_exact(monkeypatch) -> None:
    """Several splits per request; a peak in one of them must silence all the others."""
    monkeypatch.setattr("vllm_kvcompress.kernels.common.TARGET_PROGRAMS", 8)
    pages, keys, _ = random_pages([900, 260], 2, 32)
    queries = make_queries(2, 4, 4, 32)
    check_tokens(kernel, queries, pages, keys, scale=5.0, rtol=1e-4)
    check_windows(kernel, queries, pages, keys, 32, scale=5.0, rtol=1e-4)


def test_more_splits_than_are_added_up_at_once(monkeypatch) -> None:
    """Tiles of 16 tokens make 40 splits; the small launch takes 32 at a time."""
    monkeypatch.setattr("vllm_kvcompress.kernels.scores.softmax_sums._SHARED_BYTES", 8 << 10)
    pages, keys, _ = random_pages([640], 1, 32)
    queries = make_queries(1, 4, 2, 32)
    check_tokens(kernel, queries, pages, keys, scale=2.0, rtol=1e-4)
    check_windows(kernel, queries, pages, keys, 64, scale=2.0, rtol=1e-4)


def test_queries_may_be_a_strided_view() -> None:
    pages, keys, _ = random_pages([50])
    stash = torch.randn(3, 4, 9, 64, device=DEVICE)
    queries = stash[:1].transpose(1, 2)[:, :4]  # [1, 4, 4, 64]
    check_tokens(kernel, queries, pages, keys)


def test_long_rows_in_float32_are_multiplied_in_parts() -> None:
    """160 numbers are one part of 128 and one that is not full; 40 rows are three tiles."""
    pages, keys, _ = random_pages([41, 17], 1, 160)
    queries = make_queries(2, 5, 8, 160)
    check_tokens(kernel, queries, pages, keys, 160**-0.5)


def test_refuses_what_does_not_fit() -> None:
    pages, _, _ = random_pages([20, 20])
    with pytest.raises(ValueError, match="do not fit 2 requests"):
        kernel.token_scores(make_queries(3, 2, 4, 64), pages, 1.0)
    with pytest.raises(ValueError, match="no multiple of 2 KV heads"):
        kernel.token_scores(make_queries(2, 2, 3, 64), pages, 1.0)
    with pytest.raises(ValueError, match="neighbours"):
        kernel.token_scores(make_queries(2, 2, 4, 128)[..., ::2], pages, 1.0)
    with pytest.raises(ValueError, match="power of two from 8 on, got 24"):
        kernel.window_scores(make_queries(2, 2, 4, 64), pages, 1.0, 24)


def sm90_launches() -> None:
    """Llama-3-8B's shapes, and the widest rows."""
    for heads, head_dim, dtype in [
        (32, 128, torch.bfloat16), (8, 256, torch.bfloat16), (32, 256, torch.float32)
    ]:  # fmt: skip
        pages, _, _ = random_pages([64], 8, head_dim, dtype=dtype)
        queries = make_queries(1, 32, heads, head_dim, dtype)
        kernel.token_scores(queries, pages, 0.1)
        kernel.window_scores(queries, pages, 0.1, 32)

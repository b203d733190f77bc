"""Attention summed over all queries: kernel and torch version against loops in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels import torch_versions as torch_version
from tests.kernels.launches import count_launches
from tests.kernels.paged import DEVICE, LAYOUTS, nan_empty, random_pages
from vllm_kvcompress.kernels.formulas.prompt_attention import dense_attention_sums
from vllm_kvcompress.kernels.scores import prompt as kernel
from vllm_kvcompress.kernels.scores import softmax_sums

VERSIONS = pytest.mark.parametrize("module", [kernel, torch_version], ids=["triton", "torch"])


@pytest.fixture(autouse=True)
def _poison(monkeypatch) -> None:
    nan_empty(monkeypatch)


def loops(queries: np.ndarray, keys: np.ndarray, scale: float) -> np.ndarray:
    """[H, m, D] of the last m tokens, [KV, n, D] -> [KV, n]: query by query, then group means."""
    num_heads, chunk_len, _ = queries.shape
    num_kv_heads, num_tokens, _ = keys.shape
    group = num_heads // num_kv_heads
    sums = np.zeros((num_kv_heads, num_tokens))
    for head in range(num_heads):
        for i in range(chunk_len):
            seen = num_tokens - chunk_len + i + 1
            logits = [float(np.dot(queries[head, i], key)) for key in keys[head // group, :seen]]
            weights = np.exp(np.array(logits) * scale)
            sums[head // group, :seen] += weights / weights.sum() / group
    return sums


def random_case(num_tokens: int, chunk_len: int, heads: tuple[int, int]) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(num_tokens + chunk_len)
    queries = rng.standard_normal((heads[0], chunk_len, 24))
    return queries, rng.standard_normal((heads[1], num_tokens, 24))


def check(module, queries, pages, keys, scale: float = 0.3, rtol: float = 2e-5) -> None:
    """Queries [R, w, H, D] against each request's loops; zeros behind it."""
    found = module.prompt_attention_sums(queries, pages, scale).cpu()
    assert found.dtype == torch.float32
    assert found.shape == (len(keys), pages.num_kv_heads, pages.max_tokens)
    for request, rows in enumerate(keys):
        own = queries[request].transpose(0, 1).double().cpu().numpy()
        expected = loops(own, rows.numpy(), scale)
        got = found[request].numpy()
        np.testing.assert_allclose(got[:, : rows.shape[1]], expected, rtol=rtol, atol=1e-6)
        assert (got[:, rows.shape[1] :] == 0).all(), "padding is zero"


def make_queries(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


@VERSIONS
@pytest.mark.parametrize("num_heads", [1, 4, 8])
@pytest.mark.parametrize(("length", "chunk_len"), [(1, 1), (33, 33), (63, 1), (140, 40), (129, 70)])
def test_chunks_of_a_prompt(module, length: int, chunk_len: int, num_heads: int) -> None:
    """Lengths and chunks around blocks and tiles; the last query alone, and all of them."""
    num_kv_heads = max(num_heads // 4, 1)
    pages, keys, _ = random_pages([length], num_kv_heads, 64)
    check(module, make_queries((1, chunk_len, num_heads, 64)), pages, keys)


@VERSIONS
def test_a_ragged_batch(module) -> None:
    pages, keys, _ = random_pages([9, 200, 64, 131], 2, 64)
    check(module, make_queries((4, 9, 4, 64)), pages, keys)


@VERSIONS
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_head_dims_and_types(module, head_dim: int, dtype: torch.dtype) -> None:
    pages, keys, _ = random_pages([70], 2, head_dim, dtype=dtype)
    queries = make_queries((1, 37, 4, head_dim), dtype)
    check(module, queries, pages, keys, head_dim**-0.5, rtol=1e-4)


@VERSIONS
def test_8_bit_keys_with_a_scale(module) -> None:
    pages, keys, _ = random_pages([45], 2, 64, 32, torch.float8_e4m3fn, key_scale=0.3)
    check(module, make_queries((1, 20, 4, 64), torch.bfloat16), pages, keys, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_physical_layouts(layout: str) -> None:
    pages, keys, _ = random_pages([77, 50], 2, 64, 16, torch.bfloat16, layout)
    check(kernel, make_queries((2, 30, 4, 64), torch.bfloat16), pages, keys, rtol=1e-4)


@pytest.mark.parametrize("programs", [1, 10_000])
def test_splits_of_the_first_pass_and_large_logits(monkeypatch, programs: int) -> None:
    """Splits that a tile of queries does not see at all, and logits beyond float16."""
    monkeypatch.setattr("vllm_kvcompress.kernels.common.TARGET_PROGRAMS", programs)
    pages, keys, _ = random_pages([300], 1, 64)
    check(kernel, make_queries((1, 300, 1, 64)) * 4, pages, keys, scale=3.0, rtol=2e-4)


@VERSIONS
@pytest.mark.parametrize("sizes", [[111], [64, 1, 37, 9], [110, 1]])
def test_chunks_add_up_to_the_whole_prompt(module, sizes: list[int]) -> None:
    pages, keys, _ = random_pages([111], 2, 64)
    queries = make_queries((1, 111, 4, 64))
    total, end = torch.zeros(2, 111), 0
    for size in sizes:
        start, end = end, end + size
        so_far = replace(pages, num_tokens=torch.full_like(pages.num_tokens, end), max_tokens=end)
        sums = module.prompt_attention_sums(queries[:, start:end], so_far, 0.3).cpu()
        assert sums.sum().item() == pytest.approx(2 * size, rel=1e-5)
        total[:, :end] += sums[0]
    expected = loops(queries[0].transpose(0, 1).double().cpu().numpy(), keys[0].numpy(), 0.3)
    np.testing.assert_allclose(total.numpy(), expected, rtol=2e-5, atol=1e-6)


@VERSIONS
def test_takes_queries_with_other_rows_between(module) -> None:
    """Queries come as a slice of what the layer computed for queries, keys and values."""
    pages, keys, _ = random_pages([60], 2, 64)
    whole = make_queries((50, 8, 64))
    check(module, whole[10:40, :4][None], pages, keys)


def test_launches_do_not_grow_with_the_chunk_or_the_prompt(monkeypatch) -> None:
    monkeypatch.undo()  # poison is written by launches too
    counts = []
    for length, chunk_len in [(20, 3), (700, 300)]:
        pages, _, _ = random_pages([length], 1, 64, dtype=torch.bfloat16)
        queries = make_queries((1, chunk_len, 1, 64), torch.bfloat16)
        with count_launches() as count:
            kernel.prompt_attention_sums(queries, pages, 0.1)
        counts.append((count.kernels, count.operations))
    assert counts == [(3, 0)] * 2


def test_one_variant_for_all_lengths_of_a_chunk() -> None:
    """A prompt's last chunk has any length: no request waits for the compiler because of it."""
    pages, _, _ = random_pages([3000], 8, 128, dtype=torch.bfloat16)
    shapes = [
        softmax_sums.tiles(torch.zeros(1, chunk_len, 32, 128).bfloat16(), pages, fit=False)[0]
        for chunk_len in (1, 2, 16, 77, 2048)
    ]
    assert all(shape == shapes[0] for shape in shapes)
    for jitted in (softmax_sums._stats_kernel, kernel._key_sum_kernel):
        given = getattr(jitted, "kwargs", None) or {}
        skipped = given.get("do_not_specialize") or jitted.do_not_specialize
        assert {"W", "M"} <= set(skipped)


@VERSIONS
@pytest.mark.parametrize("shape", [(1, 9, 3, 64), (1, 9, 4, 80), (2, 9, 4, 64)])
def test_refuses_queries_that_do_not_fit(module, shape: tuple[int, ...]) -> None:
    pages, _, _ = random_pages([20], 2, 64)
    with pytest.raises(ValueError, match="fit|multiple"):
        module.prompt_attention_sums(torch.zeros(shape, device=DEVICE), pages, 1.0)


# --- the dense torch version ----------------------------------------------------------------


@pytest.mark.parametrize("max_logits", [1, 4 * 111, 4 * 111 * 7, 4 * 111 * 40, 2**24])
def test_blocks_of_queries_make_no_difference(max_logits: int) -> None:
    """Blocks of 1, 1, 7, 40 and all 40 queries; 40 is no multiple of 7."""
    arrays = random_case(111, 40, (8, 2))
    queries, keys = (torch.from_numpy(array).float() for array in arrays)
    found = dense_attention_sums(queries, keys, 0.3, max_logits=max_logits)
    np.testing.assert_allclose(found.numpy(), loops(*arrays, 0.3), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [[111], [64, 1, 37, 9], [1] * 111, [110, 1]])
def test_dense_chunks_add_up(sizes: list[int]) -> None:
    arrays = random_case(111, 111, (4, 2))
    queries, keys = (torch.from_numpy(array).float() for array in arrays)
    total, end = torch.zeros(2, 111), 0
    for size in sizes:
        start, end = end, end + size
        total[:, :end] += dense_attention_sums(queries[:, start:end], keys[:, :end], 0.3)
    np.testing.assert_allclose(total.numpy(), loops(*arrays, 0.3), rtol=2e-5, atol=1e-6)


def test_takes_queries_that_are_not_contiguous() -> None:
    stash = torch.randn(12, 8, 16)  # [m, H, D], as attention layers get them
    keys = torch.randn(2, 40, 16)
    found = dense_attention_sums(stash.transpose(0, 1), keys, 0.25)
    expected = dense_attention_sums(stash.transpose(0, 1).contiguous(), keys, 0.25)
    torch.testing.assert_close(found, expected)


def test_bfloat16_is_computed_in_float32() -> None:
    queries, keys = torch.randn(8, 30, 64).bfloat16(), torch.randn(2, 90, 64).bfloat16()
    expected = loops(queries.double().numpy(), keys.double().numpy(), 64**-0.5)
    found = dense_attention_sums(queries, keys, 64**-0.5)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shapes", [((3, 4, 8), (2, 9, 8)), ((4, 10, 8), (2, 9, 8))])
def test_refuses_dense_shapes_that_do_not_fit(shapes: tuple[tuple, tuple]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        dense_attention_sums(torch.zeros(shapes[0]), torch.zeros(shapes[1]), 1.0)


def sm90_launches() -> None:
    """A chunk of Llama-3-8B in bfloat16; the widest rows, rows of 96, and of 8 and 32 bits."""
    for heads, head_dim, dtype in [
        (32, 128, torch.bfloat16),
        (8, 256, torch.bfloat16),
        (32, 96, torch.bfloat16),
        (32, 128, torch.float8_e4m3fn),
        (32, 128, torch.float32),
    ]:
        pages, _, _ = random_pages([64], 8, head_dim, dtype=dtype)
        kind = dtype if dtype.itemsize > 1 else torch.bfloat16
        queries = make_queries((1, 64, heads, head_dim), kind)
        kernel.prompt_attention_sums(queries, replace(pages, max_tokens=8192), 0.1)

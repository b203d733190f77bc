"""Attention summed over all queries, against loops in float64."""

import numpy as np
import pytest
import torch

from vllm_kvcompress.kernels.prompt_attention import prompt_attention_sums


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


@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (8, 1), (4, 4)])
@pytest.mark.parametrize(("num_tokens", "chunk_len"), [(1, 1), (33, 33), (63, 1), (111, 40)])
def test_matches_loops(num_tokens: int, chunk_len: int, heads: tuple[int, int]) -> None:
    queries, keys = random_case(num_tokens, chunk_len, heads)
    found = prompt_attention_sums(
        torch.from_numpy(queries).float(), torch.from_numpy(keys).float(), 0.3
    )
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), loops(queries, keys, 0.3), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found.sum(dim=1).numpy(), chunk_len, rtol=1e-5)


@pytest.mark.parametrize("max_logits", [1, 4 * 111, 4 * 111 * 7, 4 * 111 * 40, 2**24])
def test_blocks_of_queries_make_no_difference(max_logits: int) -> None:
    """Blocks of 1, 1, 7, 40 and all 40 queries; 40 is no multiple of 7."""
    arrays = random_case(111, 40, (8, 2))
    queries, keys = (torch.from_numpy(array).float() for array in arrays)
    found = prompt_attention_sums(queries, keys, 0.3, max_logits)
    np.testing.assert_allclose(found.numpy(), loops(*arrays, 0.3), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [[111], [64, 1, 37, 9], [1] * 111, [110, 1]])
def test_chunks_add_up_to_the_whole_prompt(sizes: list[int]) -> None:
    arrays = random_case(111, 111, (4, 2))
    queries, keys = (torch.from_numpy(array).float() for array in arrays)
    total, end = torch.zeros(2, 111), 0
    for size in sizes:
        start, end = end, end + size
        total[:, :end] += prompt_attention_sums(queries[:, start:end], keys[:, :end], 0.3)
    np.testing.assert_allclose(total.numpy(), loops(*arrays, 0.3), rtol=2e-5, atol=1e-6)


def test_takes_queries_that_are_not_contiguous() -> None:
    stash = torch.randn(12, 8, 16)  # [m, H, D], as attention layers get them
    keys = torch.randn(2, 40, 16)
    found = prompt_attention_sums(stash.transpose(0, 1), keys, 0.25)
    expected = prompt_attention_sums(stash.transpose(0, 1).contiguous(), keys, 0.25)
    torch.testing.assert_close(found, expected)


def test_bfloat16_is_computed_in_float32() -> None:
    queries, keys = torch.randn(8, 30, 64).bfloat16(), torch.randn(2, 90, 64).bfloat16()
    expected = loops(queries.double().numpy(), keys.double().numpy(), 64**-0.5)
    found = prompt_attention_sums(queries, keys, 64**-0.5)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shapes", [((3, 4, 8), (2, 9, 8)), ((4, 10, 8), (2, 9, 8))])
def test_refuses_shapes_that_do_not_fit(shapes: tuple[tuple, tuple]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        prompt_attention_sums(torch.zeros(shapes[0]), torch.zeros(shapes[1]), 1.0)

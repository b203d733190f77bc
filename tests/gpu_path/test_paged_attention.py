"""The test backend's attention against numpy in float64, and against vLLM's Triton kernel."""

import numpy as np
import pytest
import torch

from lab.gpu_path.paged_attention import paged_attention, write_cache

HEADS, QUERY_HEADS, DIM, BLOCK = 2, 6, 32, 16
SCALE = 0.2
LENGTHS = [(1, 1), (17, 17), (40, 1), (33, 5)]
"""Tokens in the cache, and queries among them."""


def make_case(seed: int = 0) -> dict[str, torch.Tensor]:
    """Requests whose blocks lie in disorder; what no table names is not a number."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // BLOCK) for length, _ in LENGTHS]
    order = torch.randperm(sum(counts) + 3, generator=generator)
    # Physically [blocks, slots, heads, K||V], as FlashAttention has it.
    cache = torch.full((len(order), BLOCK, HEADS, 2 * DIM), torch.nan).transpose(1, 2)
    table = torch.zeros(len(LENGTHS), max(counts), dtype=torch.int32)
    slots = []
    for row, (length, _) in enumerate(LENGTHS):
        first = sum(counts[:row])
        table[row, : counts[row]] = order[first : first + counts[row]]
        places = torch.arange(length)
        slots.append(table[row, places // BLOCK].long() * BLOCK + places % BLOCK)
    num_tokens = sum(length for length, _ in LENGTHS)
    rows = torch.randn(num_tokens, HEADS, 2 * DIM, generator=generator)
    write_cache(rows[..., :DIM], rows[..., DIM:], cache, torch.cat(slots))
    num_queries = [count for _, count in LENGTHS]
    return {
        "queries": torch.randn(sum(num_queries), QUERY_HEADS, DIM, generator=generator),
        "cache": cache,
        "starts": torch.tensor(np.cumsum([0, *num_queries]), dtype=torch.int32),
        "seq_lens": torch.tensor([length for length, _ in LENGTHS], dtype=torch.int32),
        "table": table,
        "rows": rows,
    }


def attend(case: dict[str, torch.Tensor]) -> torch.Tensor:
    out = torch.full_like(case["queries"], torch.nan)
    inputs = [case[name] for name in ("queries", "cache", "starts", "seq_lens", "table")]
    paged_attention(*inputs, SCALE, out)
    return out


def test_it_is_causal_attention_of_each_request() -> None:
    case = make_case()
    found, queries = attend(case).numpy(), case["queries"].double().numpy()
    first_row = first_query = 0
    for length, count in LENGTHS:
        own = case["rows"][first_row : first_row + length].double().numpy()
        for number in range(count):
            seen = length - count + number + 1
            for head in range(QUERY_HEADS):
                group = head // (QUERY_HEADS // HEADS)
                keys, values = own[:seen, group, :DIM], own[:seen, group, DIM:]
                logits = keys @ queries[first_query + number, head] * SCALE
                weights = np.exp(logits - logits.max())
                expected = weights @ values / weights.sum()
                np.testing.assert_allclose(
                    found[first_query + number, head], expected, rtol=2e-5, atol=2e-6
                )
        first_row, first_query = first_row + length, first_query + count


def test_it_agrees_with_vllms_triton_kernel() -> None:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    case = make_case(1)
    keys, values = case["cache"].transpose(1, 2).nan_to_num().split(DIM, dim=-1)
    expected = torch.zeros_like(case["queries"])
    unified_attention(
        q=case["queries"],
        k=keys,
        v=values,
        out=expected,
        cu_seqlens_q=case["starts"],
        max_seqlen_q=max(count for _, count in LENGTHS),
        seqused_k=case["seq_lens"],
        max_seqlen_k=max(length for length, _ in LENGTHS),
        softmax_scale=SCALE,
        causal=True,
        window_size=(-1, -1),
        block_table=case["table"],
        softcap=0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
    )
    torch.testing.assert_close(attend(case), expected, rtol=1e-4, atol=1e-5)


def test_a_slot_below_zero_is_not_written() -> None:
    cache = torch.zeros(2, HEADS, BLOCK, 2 * DIM)
    rows = torch.ones(3, HEADS, DIM)
    write_cache(rows, 2 * rows, cache, torch.tensor([-1, 17]))
    assert cache.count_nonzero() == HEADS * 2 * DIM, "one token"
    assert (cache[1, :, 1, :DIM] == 1).all() and (cache[1, :, 1, DIM:] == 2).all()


def test_more_queries_than_tokens_is_refused() -> None:
    case = make_case()
    case["seq_lens"][3] = 4
    with pytest.raises(ValueError, match="row 3 has 5 queries and 4 tokens"):
        attend(case)

"""Attention over codes and the ordinary tokens behind them: kernels and torch version against
loops in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.kernels.codebook.test_attention import (
    TOLERANCE,
    VERSIONS,
    attend,
    frequencies,
    make_queries,
    random_book,
    reconstructed,
)
from tests.kernels.paged import DEVICE, LAYOUTS, OUTSIDE, make_cache, nan_empty
from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.codebook import attention as kernel
from vllm_kvcompress.kernels.codebook.pages import TailPages
from vllm_kvcompress.kernels.formulas.rotary import Rotary


@pytest.fixture(autouse=True)
def _poison(monkeypatch) -> None:
    nan_empty(monkeypatch)


def int32(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def random_tail(
    lengths, first_slots, num_kv_heads=2, head_dim=32, block_size=16, dtype=torch.float32,
    layout="LBHNC", key_scale=1.0, value_scale=1.0, seed=5,
):  # fmt: skip
    """Tails behind `first_slots` slots that are not theirs, and their exact keys and values.

    Returns
    -------
    tuple
        TailPages; per request (keys, values), both [KV, n, D] float64, as stored and scaled.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = list(zip(first_slots, lengths, strict=True))
    spans = [range(first // block_size, -(-(first + n) // block_size)) for first, n in rows]
    num_blocks = sum(map(len, spans)) + 3
    cache = make_cache(num_blocks, num_kv_heads, block_size, 2 * head_dim, dtype, layout)[1]
    order = torch.randperm(num_blocks, generator=generator).tolist()
    table = torch.full((len(rows), max(span.stop for span in spans) + 2), OUTSIDE)
    exact = []
    for request, (first, length) in enumerate(rows):
        for entry in spans[request] if length else ():
            table[request, entry] = order.pop()
        stored = torch.randn(num_kv_heads, length, 2 * head_dim, generator=generator).to(dtype)
        write_tail(cache, table[request], first, stored.to(DEVICE), block_size)
        keys, values = stored.double().split(head_dim, dim=2)
        exact.append((keys * key_scale, values * value_scale))
    halves = cache[..., :head_dim], cache[..., head_dim:]
    table = table.to(torch.int32).to(DEVICE)
    pages = Pages(*halves, table, int32(lengths), max(lengths), key_scale, value_scale)
    return TailPages(pages, int32(first_slots)), exact


def write_tail(cache, table_row, first_slot: int, rows: torch.Tensor, block_size: int) -> None:
    """Write [KV, n, C] rows from a slot of a table row on."""
    for token in range(rows.shape[1]):
        entry, offset = divmod(first_slot + token, block_size)
        cache[int(table_row[entry]), :, offset] = rows[:, token]


def without_codes(book, requests):
    """The book with some requests emptied, whose table rows must not be followed any more."""
    tables = book.entries.block_table.clone(), book.code_table.clone()
    counts = book.entries.num_tokens.clone(), book.num_tokens.clone()
    for table, count in zip(tables, counts, strict=True):
        table[requests], count[requests] = OUTSIDE, 0
    entries = replace(book.entries, block_table=tables[0], num_tokens=counts[0])
    return replace(book, entries=entries, code_table=tables[1], num_tokens=counts[1])


def check(module, queries, book, codes, tail, tails, is_neox=True, scale=0.3) -> None:
    """`codes` and `tails`: the exact numbers of each request, None where it has none."""
    num_requests, num_heads, head_dim = queries.shape
    inv_freq = frequencies(head_dim)
    out, lse = module.codebook_attention(queries, book, inv_freq, is_neox, scale, tail)
    assert out.shape == queries.shape and out.dtype == queries.dtype and out.is_contiguous()
    assert lse.shape == (num_requests, num_heads) and lse.dtype == torch.float32
    tolerance = TOLERANCE[queries.dtype]
    group = num_heads // book.entries.num_kv_heads
    for request in range(num_requests):
        for head in range(num_heads):
            keys, values = [np.zeros((0, head_dim))], [np.zeros((0, head_dim))]
            if codes[request] is not None and codes[request]["position"].shape[1]:
                some = reconstructed(codes[request], head // group, inv_freq, is_neox)
                keys.append(some[0])
                values.append(some[1])
            keys.append(tails[request][0][head // group].numpy())
            values.append(tails[request][1][head // group].numpy())
            keys, values = np.concatenate(keys), np.concatenate(values)
            found = out[request, head].double().cpu().numpy()
            if not len(keys):
                assert (found == 0).all() and float(lse[request, head]) == float("-inf")
                continue
            query = queries[request, head].double().cpu().numpy()
            wanted, wanted_lse = attend(query, keys, values, scale)
            np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=3 * tolerance)
            assert abs(float(lse[request, head]) - wanted_lse) < 4 * tolerance


@VERSIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "first_slots"),
    [
        ([1], [0]),
        ([15, 16, 17], [16, 32, 48]),
        ([0, 63], [48, 5]),
        ([111, 0, 65], [1, 0, 31]),
        ([64], [15]),
    ],
)
def test_tails_around_block_edges(module, lengths, first_slots, dtype) -> None:
    book, codes = random_book([9, 0, 20][: len(lengths)], head_dim=32, dtype=dtype)
    tail, tails = random_tail(lengths, first_slots, dtype=dtype)
    check(module, make_queries(len(lengths), 4, 32, dtype), book, codes, tail, tails)


@VERSIONS
@pytest.mark.parametrize("max_codes", [0, 40])
def test_requests_without_codes(module, max_codes: int) -> None:
    """Alone, so that nothing is launched for codes, and beside a request that has some."""
    lengths = [max_codes, 7, 3]
    book, codes = random_book(lengths, head_dim=32)
    book = without_codes(book, [1, 2] if max_codes else [0, 1, 2])
    book = replace(book, max_tokens=max_codes)
    codes = [codes[0] if max_codes else None, None, None]
    tail, tails = random_tail([17, 70, 0], [16, 0, 0])
    check(module, make_queries(3, 4, 32), book, codes, tail, tails)


@VERSIONS
def test_neither_codes_nor_tail(module) -> None:
    book, _ = random_book([4, 5], head_dim=32)
    book = replace(without_codes(book, [0, 1]), max_tokens=0)
    tail, tails = random_tail([0, 0], [0, 16])
    queries = make_queries(2, 4, 32)
    for one in (tail, None):
        check(module, queries, book, [None, None], one, tails)


@VERSIONS
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(2, 2, 64), (4, 1, 96), (8, 1, 128), (4, 1, 256), (20, 1, 32)],
)
def test_head_shapes(module, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    book, codes = random_book([10], num_kv_heads, head_dim)
    tail, tails = random_tail([23], [16], num_kv_heads, head_dim)
    queries = make_queries(1, num_heads, head_dim)
    check(module, queries, book, codes, tail, tails, scale=head_dim**-0.5)


@VERSIONS
@pytest.mark.parametrize(
    ("layout", "block_size"), list(zip(LAYOUTS, [16, 32, 64, 16, 32, 64], strict=True))
)
def test_physical_layouts(module, layout: str, block_size: int) -> None:
    """The tail's values lie elsewhere, in another order than its keys."""
    book, codes = random_book([10, 5], 2, 32, block_size, torch.float16, layout)
    tail, tails = random_tail([70, 5], [64, 3], 2, 32, block_size, torch.float16, layout)
    tail = replace(tail, pages=replace(tail.pages, values=tail.pages.values.contiguous()))
    check(module, make_queries(2, 2, 32), book, codes, tail, tails)


@VERSIONS
@pytest.mark.parametrize(
    ("query_dtype", "dtype", "scales"),
    [
        (torch.bfloat16, torch.bfloat16, (1.0, 1.0)),
        (torch.float32, torch.bfloat16, (1.0, 1.0)),
        (torch.bfloat16, torch.float8_e4m3fn, (0.37, 0.5)),
        (torch.float16, torch.float8_e5m2, (0.25, 2.5)),
    ],
)
def test_dtypes(module, query_dtype, dtype, scales) -> None:
    book, codes = random_book([20, 9], 2, 64, dtype=dtype)
    tail, tails = random_tail(
        [33, 18], [16, 0], 2, 64, dtype=dtype, key_scale=scales[0], value_scale=scales[1]
    )
    queries = make_queries(2, 4, 64, query_dtype)
    check(module, queries, book, codes, tail, tails, scale=64**-0.5)


@VERSIONS
def test_an_empty_tail_changes_no_bit(module) -> None:
    book, _ = random_book([70, 20], head_dim=32)
    queries, inv_freq = make_queries(2, 4, 32), frequencies(32)
    plain = module.codebook_attention(queries, book, inv_freq, True, 0.3)
    empty = random_tail([0, 0], [16, 0])[0]
    half = random_tail([0, 40], [16, 0])[0]
    same = module.codebook_attention(queries, book, inv_freq, True, 0.3, empty)
    beside = module.codebook_attention(queries, book, inv_freq, True, 0.3, half)
    for found, other, wanted in zip(same, beside, plain, strict=True):
        assert torch.equal(found, wanted)
        assert torch.equal(other[0], wanted[0]) and not torch.equal(other[1], wanted[1])


@VERSIONS
def test_query_tokens_of_one_request_differ_in_their_tails_only(module) -> None:
    """Speculation: three queries share a row's tables, and each sees one token more."""
    book, codes = random_book([21], 2, 32)
    tail, tails = random_tail([18], [32])
    table = tail.pages.block_table.expand(3, -1)
    lengths = [16, 17, 18]
    tail = TailPages(
        replace(tail.pages, block_table=table, num_tokens=int32(lengths)), int32([32] * 3)
    )
    entries = replace(
        book.entries,
        block_table=book.entries.block_table.expand(3, -1),
        num_tokens=book.entries.num_tokens.repeat(3),
    )
    book = replace(
        book,
        entries=entries,
        code_table=book.code_table.expand(3, -1),
        num_tokens=book.num_tokens.repeat(3),
    )
    shorter = [tuple(rows[:, :length] for rows in tails[0]) for length in lengths]
    check(module, make_queries(3, 4, 32), book, codes * 3, tail, shorter)


@pytest.mark.parametrize("programs", [1, 3, 8, 40])
@pytest.mark.parametrize("loud", ["codes", "tail"])
def test_splits_of_both_kinds_and_large_logits(monkeypatch, programs: int, loud: str) -> None:
    """A peak among the codes must silence the tail, and the other way round."""
    monkeypatch.setattr("vllm_kvcompress.kernels.common.TARGET_PROGRAMS", programs)
    book, codes = random_book([200, 40], 1, 32)
    tail, tails = random_tail([30, 300], [16, 7], 1)
    if loud == "tail":
        tail.pages.keys.mul_(9)
        tails = [(keys * 9, values) for keys, values in tails]
    check(kernel, make_queries(2, 2, 32), book, codes, tail, tails, scale=3.0)


@VERSIONS
def test_one_row_of_one_cache_holds_entries_codes_and_tail(module) -> None:
    """As in an engine: the entries' table is the whole row, whose tail lies in the books' cache."""
    book, codes = random_book([150], 2, 32, num_entries=(23,))
    entries = book.entries
    used = [
        int(block) for table in (entries.block_table, book.code_table) for block in table[0]
        if block != OUTSIDE
    ]  # fmt: skip
    free = [block for block in range(len(entries.keys)) if block not in used]
    row = int32([[*used, *free, OUTSIDE]])
    first, length = len(used) * 16, 37
    rows = torch.randn(2, 2, length, 32, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    write_tail(entries.keys, row[0], first, rows[0], 16)
    write_tail(entries.values, row[0], first, rows[1], 16)
    book = replace(book, entries=replace(entries, block_table=row))
    pages = replace(book.entries, num_tokens=int32([length]), max_tokens=length)
    tails = [tuple(rows.double().cpu())]
    tail = TailPages(pages, int32([first]))
    check(module, make_queries(1, 4, 32), book, codes, tail, tails)


@VERSIONS
@pytest.mark.parametrize("is_neox", [True, False], ids=["halves", "interleaved"])
def test_codes_and_tail_are_ordinary_attention_over_both(module, is_neox: bool) -> None:
    """Against torch's own attention over keys and values that are put together beforehand."""
    book, codes = random_book([50], 2, 64)
    tail, tails = random_tail([29], [16], 2, 64)
    queries, inv_freq = make_queries(1, 8, 64), frequencies(64)
    heads = torch.arange(2)[:, None]
    stored = {name: numbers.to(DEVICE) for name, numbers in codes[0].items()}
    keys = stored["keys"][heads, stored["key_index"]] * stored["key_length"][..., None].double()
    keys = Rotary(inv_freq, is_neox).rotate(keys, stored["position"])
    values = stored["values"][heads, stored["value_index"]]
    values = values * stored["value_length"][..., None].double()
    keys = torch.cat([keys, tails[0][0].to(DEVICE)], dim=1)
    values = torch.cat([values, tails[0][1].to(DEVICE)], dim=1)
    wanted = scaled_dot_product_attention(
        queries.double().transpose(0, 1), keys.repeat_interleave(4, dim=0),
        values.repeat_interleave(4, dim=0), scale=0.2,
    )  # fmt: skip
    out, _ = module.codebook_attention(queries, book, inv_freq, is_neox, 0.2, tail)
    torch.testing.assert_close(out[0].double(), wanted[:, 0], rtol=1e-5, atol=3e-5)


@VERSIONS
def test_no_requests_give_empty_outputs(module) -> None:
    book, _ = random_book([5], head_dim=32)
    tail = random_tail([3], [0])[0]
    entries = replace(book.entries, block_table=book.entries.block_table[:0], num_tokens=int32([]))
    book = replace(
        book, entries=entries, code_table=book.code_table[:0], num_tokens=int32([]), max_tokens=0
    )
    pages = replace(tail.pages, block_table=tail.pages.block_table[:0], num_tokens=int32([]))
    tail = TailPages(replace(pages, max_tokens=0), int32([]))
    queries = make_queries(1, 4, 32, torch.float16)[:0]
    for one in (None, tail):
        out, lse = module.codebook_attention(queries, book, frequencies(32), True, 1.0, one)
        assert out.shape == (0, 4, 32) and out.dtype == torch.float16
        assert lse.shape == (0, 4) and lse.dtype == torch.float32


@VERSIONS
def test_refuses_what_does_not_fit(module) -> None:
    book, _ = random_book([5, 5], head_dim=32)
    queries, tail = make_queries(2, 4, 32), random_tail([3, 4], [0, 0])[0]

    def attention(tail, book=book):
        return module.codebook_attention(queries, book, frequencies(32), True, 1.0, tail)

    with pytest.raises(ValueError, match="tail of 3 requests"):
        attention(random_tail([1, 1, 1], [0, 0, 0])[0])
    with pytest.raises(ValueError, match="1 KV heads and head_dim 32 is not one of 2"):
        attention(random_tail([1, 1], [0, 0], 1)[0])
    with pytest.raises(ValueError, match="head_dim 64 is not one of"):
        attention(random_tail([1, 1], [0, 0], head_dim=64)[0])
    with pytest.raises(ValueError, match=r"first_slot of a tail is \(1,\)"):
        attention(replace(tail, first_slot=int32([0])))
    with pytest.raises(ValueError, match="first_slot of a tail is .* side by side"):
        attention(replace(tail, first_slot=int32([0]).expand(2)))
    with pytest.raises(ValueError, match=r"num_tokens of a tail is \(2,\) torch.int64"):
        attention(replace(tail, pages=replace(tail.pages, num_tokens=torch.tensor([3, 4]))))
    with pytest.raises(ValueError, match="numbers of tokens .* side by side"):
        attention(tail, replace(book, num_tokens=int32([5]).expand(2)))
    with pytest.raises(ValueError, match="code table of 1 rows for 2 requests"):
        attention(tail, replace(book, code_table=book.code_table[:1]))


def sm90_launches() -> None:
    """Llama-3-8B's shapes in 32, 16 and 8 bits, and wide rows."""
    for heads, head_dim, dtype in [
        (32, 128, torch.bfloat16),
        (32, 128, torch.float32),
        (32, 128, torch.float8_e4m3fn),
        (8, 256, torch.bfloat16),
    ]:
        book, _ = random_book([64], 8, head_dim, dtype=dtype)
        tail, _ = random_tail([64], [16], 8, head_dim, dtype=dtype)
        tail = replace(tail, pages=replace(tail.pages, max_tokens=2048))
        query_dtype = dtype if dtype.itemsize > 1 else torch.bfloat16
        queries = make_queries(1, heads, head_dim, query_dtype)
        book = replace(book, max_tokens=16384)
        kernel.codebook_attention(queries, book, frequencies(head_dim), True, 0.1, tail)

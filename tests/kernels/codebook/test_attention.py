"""Attention over codebook tokens: the kernel and its torch version against loops in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.kernels.paged import DEVICE, LAYOUTS, OUTSIDE, fill, make_cache, nan_empty
from vllm_kvcompress.kernels import torch_backend as torch_version
from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.codebook import attention as kernel
from vllm_kvcompress.kernels.codebook.build import build_codebook
from vllm_kvcompress.kernels.codebook.format import codes_per_row
from vllm_kvcompress.kernels.codebook.packing import pack_codes, unpack_codes
from vllm_kvcompress.kernels.codebook.pages import CodebookPages

VERSIONS = pytest.mark.parametrize("module", [kernel, torch_version], ids=["triton", "torch"])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _poison(monkeypatch) -> None:
    nan_empty(monkeypatch)


def frequencies(rotary_dim: int) -> torch.Tensor:
    return 10000.0 ** (-torch.arange(0, rotary_dim, 2, device=DEVICE) / rotary_dim)


def make_queries(num_requests, num_heads, head_dim, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(num_requests, num_heads, head_dim, generator=generator)
    return queries.to(dtype).to(DEVICE)


def make_codes(num_kv_heads, length, num_entries, generator, last=100_000):
    """Random codes of one request, [KV, length] each; lengths that float16 can hold."""
    shape = (num_kv_heads, length)
    return {
        "key_index": torch.randint(num_entries, shape, generator=generator),
        "value_index": torch.randint(num_entries, shape, generator=generator),
        "key_length": (torch.rand(shape, generator=generator) * 12 + 0.1).half(),
        "value_length": (torch.rand(shape, generator=generator) * 12 + 0.1).half(),
        "position": torch.randint(last, shape, generator=generator),
    }


def write_codes(view: torch.Tensor, blocks: list[int], codes: dict[str, torch.Tensor]) -> None:
    """Number by number into [B, KV, N, W] int16; all other bits stay those of NaN."""
    _, num_kv_heads, block_size, width = view.shape
    per_row = max(2**i for i in range(16) if 6 * 2**i <= width)
    runs = [codes["key_index"], codes["value_index"]]
    runs += [codes[name].view(torch.int16) for name in ("key_length", "value_length")]
    runs += [codes["position"] % 2**16, codes["position"] // 2**16]
    for head in range(num_kv_heads):
        for token in range(codes["position"].shape[1]):
            row, element = divmod(token, per_row)
            place = view[blocks[row // block_size], head, row % block_size]
            for run, numbers in enumerate(runs):
                number = int(numbers[head, token]) & 0xFFFF
                place[run * per_row + element] = number - 2**16 if number >= 2**15 else number


def random_book(
    lengths, num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.float32, layout="LBHNC",
    num_entries=(23, 16, 1, 40), key_scale=1.0, value_scale=1.0, seed=0, last=100_000,
):  # fmt: skip
    """Books and codes in one layer's cache, and per request the exact numbers behind them.

    Returns
    -------
    tuple
        CodebookPages; per request the codes, with "keys" and "values" [KV, E, D] float64: the
        entries as stored and scaled.
    """
    generator = torch.Generator().manual_seed(seed)
    num_entries = num_entries[: len(lengths)]
    width = head_dim * dtype.itemsize
    per_block = codes_per_row(width) * block_size
    entry_counts = [-(-count // block_size) for count in num_entries]
    code_counts = [-(-length // per_block) for length in lengths]
    num_blocks = sum(entry_counts) + sum(code_counts) + 3
    cache = make_cache(num_blocks, num_kv_heads, block_size, 2 * head_dim, dtype, layout)[1]
    view = cache.view(torch.int16)
    order = torch.randperm(num_blocks, generator=generator).tolist()
    shapes = [(len(lengths), max(counts) + 2) for counts in (entry_counts, code_counts)]
    tables = [torch.full(shape, OUTSIDE, dtype=torch.int32) for shape in shapes]
    exact = []
    for request, length in enumerate(lengths):
        blocks = [order.pop() for _ in range(entry_counts[request])]
        tables[0][request, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        shape = (num_kv_heads, num_entries[request], head_dim)
        keys = normalize(torch.randn(shape, generator=generator), dim=2) / key_scale
        values = normalize(torch.randn(shape, generator=generator), dim=2) / value_scale
        stored = torch.cat([keys, values], dim=2).to(dtype)
        fill(cache, blocks, stored.to(DEVICE))
        blocks = [order.pop() for _ in range(code_counts[request])]
        tables[1][request, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        codes = make_codes(num_kv_heads, length, num_entries[request], generator, last)
        write_codes(view, blocks, codes)
        keys, values = stored.double().split(head_dim, dim=2)
        exact.append(codes | {"keys": keys * key_scale, "values": values * value_scale})
    pages = Pages(
        keys=cache[..., :head_dim],
        values=cache[..., head_dim:],
        block_table=tables[0].to(DEVICE),
        num_tokens=torch.tensor(num_entries, dtype=torch.int32, device=DEVICE),
        max_tokens=max(num_entries),
        key_scale=key_scale,
        value_scale=value_scale,
    )
    num_tokens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    book = CodebookPages(pages, view, tables[1].to(DEVICE), num_tokens, max(lengths))
    return book, exact


def turned(vector: np.ndarray, position: int, inv_freq: np.ndarray, is_neox: bool) -> np.ndarray:
    """One vector after RoPE, pair by pair."""
    half, result = len(inv_freq), vector.copy()
    for pair in range(half):
        a, b = (pair, pair + half) if is_neox else (2 * pair, 2 * pair + 1)
        angle = float(np.float32(position) * inv_freq[pair])
        result[a] = vector[a] * np.cos(angle) - vector[b] * np.sin(angle)
        result[b] = vector[b] * np.cos(angle) + vector[a] * np.sin(angle)
    return result


def reconstructed(exact: dict, head: int, inv_freq, is_neox: bool) -> tuple[np.ndarray, ...]:
    """K and V [n, D] float64 of one KV head, token by token."""
    keys, values = [], []
    for token in range(exact["position"].shape[1]):
        unit = exact["keys"][head, exact["key_index"][head, token]].numpy()
        key = unit * float(exact["key_length"][head, token])
        position = int(exact["position"][head, token])
        keys.append(turned(key, position, inv_freq.cpu().numpy(), is_neox))
        unit = exact["values"][head, exact["value_index"][head, token]].numpy()
        values.append(unit * float(exact["value_length"][head, token]))
    return np.array(keys), np.array(values)


def attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float):
    """Output [D] and natural logarithm of the softmax's denominator, in float64."""
    logits = keys @ query * scale
    weights = np.exp(logits - logits.max())
    return weights @ values / weights.sum(), np.log(weights.sum()) + logits.max()


def check(module, queries, book, exact, inv_freq=None, is_neox=True, scale=0.3) -> None:
    num_requests, num_heads, head_dim = queries.shape
    if inv_freq is None:
        inv_freq = frequencies(head_dim)
    out, lse = module.codebook_attention(queries, book, inv_freq, is_neox, scale)
    assert out.shape == queries.shape and out.dtype == queries.dtype and out.is_contiguous()
    assert lse.shape == (num_requests, num_heads) and lse.dtype == torch.float32
    tolerance = TOLERANCE[queries.dtype]
    for request in range(num_requests):
        if not exact[request]["position"].shape[1]:
            assert (out[request] == 0).all() and (lse[request] == float("-inf")).all()
            continue
        group = num_heads // book.entries.num_kv_heads
        for head in range(num_heads):
            if head % group == 0:
                keys, values = reconstructed(exact[request], head // group, inv_freq, is_neox)
            query = queries[request, head].double().cpu().numpy()
            wanted, wanted_lse = attend(query, keys, values, scale)
            found = out[request, head].double().cpu().numpy()
            np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=3 * tolerance)
            assert abs(float(lse[request, head]) - wanted_lse) < 4 * tolerance


@VERSIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("lengths", [[1], [15, 16, 17], [0, 63], [111, 0, 32, 33], [65, 64]])
def test_ragged_batches_around_the_edges_of_rows_and_tiles(module, lengths, dtype) -> None:
    book, exact = random_book(lengths, head_dim=32, dtype=dtype)
    check(module, make_queries(len(lengths), 4, 32, dtype), book, exact)


@VERSIONS
@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (8, 1)], ids=["1:1", "4:1", "8:1"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_head_shapes(module, heads: tuple[int, int], head_dim: int) -> None:
    book, exact = random_book([40], heads[1], head_dim)
    check(module, make_queries(1, heads[0], head_dim), book, exact, scale=head_dim**-0.5)


def test_more_query_heads_than_a_tile_of_rows() -> None:
    book, exact = random_book([9], 1, 32)
    check(kernel, make_queries(1, 20, 32), book, exact)


@VERSIONS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_physical_layouts(module, layout: str, block_size: int) -> None:
    """Rows of 64 bytes take 4 tokens, so 70 tokens reach into a second block of 16 rows."""
    book, exact = random_book([70, 5], 2, 32, block_size, torch.float16, layout)
    check(module, make_queries(2, 2, 32), book, exact)


@VERSIONS
@pytest.mark.parametrize(
    ("query_dtype", "dtype", "scales"),
    [
        (torch.bfloat16, torch.bfloat16, (1.0, 1.0)),
        (torch.float16, torch.float16, (1.0, 1.0)),
        (torch.bfloat16, torch.float8_e4m3fn, (0.037, 0.05)),
        (torch.float16, torch.float8_e5m2, (0.25, 2.5)),
        (torch.float32, torch.float8_e4m3fn, (0.02, 0.01)),
    ],
)
def test_dtypes(module, query_dtype, dtype, scales) -> None:
    book, exact = random_book([50, 33], 2, 64, dtype=dtype, key_scale=scales[0],
                              value_scale=scales[1])  # fmt: skip
    check(module, make_queries(2, 4, 64, query_dtype), book, exact, scale=64**-0.5)


@VERSIONS
@pytest.mark.parametrize("is_neox", [True, False], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [80, 64, 24, 2])
def test_rotary_embeddings(module, is_neox: bool, rotary_dim: int) -> None:
    """Positions of up to 2^20, whose angles in float32 a sloppy reduction would lose."""
    book, exact = random_book([37], 1, 80, last=2**20)
    inv_freq = frequencies(rotary_dim)
    check(module, make_queries(1, 2, 80), book, exact, inv_freq, is_neox)


@pytest.mark.parametrize("programs", [1, 3, 8])
def test_splits_of_several_tiles_and_large_logits(monkeypatch, programs: int) -> None:
    """A peak in one split must silence all the others."""
    monkeypatch.setattr("vllm_kvcompress.kernels.common.TARGET_PROGRAMS", programs)
    book, exact = random_book([300, 70], 1, 32)
    check(kernel, make_queries(2, 2, 32), book, exact, scale=3.0)


@VERSIONS
def test_entry_numbers_have_no_sign(module) -> None:
    """65536 entries, most of which share their blocks."""
    book, exact = random_book([20], 1, 32, num_entries=(48,))
    count, size = 65536, book.entries.block_size
    blocks = book.entries.block_table[:, :3]
    table = blocks.repeat(1, count // size // 3 + 1)[:, : count // size].contiguous()
    num_entries = torch.full_like(book.num_tokens, count)
    entries = replace(book.entries, block_table=table, num_tokens=num_entries, max_tokens=count)
    codes = exact[0]
    for name in ("key_index", "value_index"):
        codes[name] = torch.randint(
            count, codes[name].shape, generator=torch.Generator().manual_seed(len(name))
        )
        assert (codes[name] >= 32768).any()
    write_codes(book.codes, book.code_table[0].tolist(), codes)
    for name in ("keys", "values"):
        codes[name] = codes[name].repeat(1, count // 48 + 1, 1)[:, :count]
    check(module, make_queries(1, 2, 32), replace(book, entries=entries), exact)


@VERSIONS
@pytest.mark.parametrize("num_directions", [40, 25])
def test_a_lossless_book_is_plain_attention(module, num_directions: int) -> None:
    """From vectors to a built book, packed codes and outputs, against attention over the vectors
    themselves; alone, and merged with that over a tail. Vectors of 25 directions share entries."""
    generator = torch.Generator().manual_seed(3)
    units = normalize(torch.randn(2, 2, num_directions, 64, generator=generator), dim=3)
    units = units[:, :, torch.arange(40) % num_directions]  # [K and V, KV, n, D]
    lengths = (torch.rand(2, 2, 40, 1, generator=generator) * 12 + 0.1).half().float()
    vectors = (units * lengths).to(DEVICE)
    count = torch.full((4,), 40, dtype=torch.int32, device=DEVICE)
    built = build_codebook(vectors.flatten(0, 1), count, 0.999, 40)
    assert (built.num_entries == num_directions).all()

    book, _ = random_book([40], 2, 64, num_entries=(num_directions,))
    entries = built.entries[:, :num_directions, None].long().expand(-1, -1, 64)
    stored = normalize(vectors, dim=3).flatten(0, 1).gather(1, entries).unflatten(0, (2, 2))
    blocks = book.entries.block_table[0].tolist()
    fill(book.entries.keys, blocks, stored[0])
    fill(book.entries.values, blocks, stored[1])
    index, length = built.index.unflatten(0, (2, 2)), built.magnitude.unflatten(0, (2, 2))
    positions = torch.arange(40, device=DEVICE).expand(2, 40)
    rows = pack_codes(*index, *length, positions, book.codes.shape[3])
    fill(book.codes, book.code_table[0].tolist(), rows)

    queries, inv_freq = make_queries(1, 2, 64), frequencies(64)
    out, lse = module.codebook_attention(queries, book, inv_freq, True, 0.2)
    exact, freq = vectors.double().cpu().numpy(), inv_freq.cpu().numpy()
    for head in range(2):
        query = queries[0, head].double().cpu().numpy()
        keys = np.array([turned(key, t, freq, True) for t, key in enumerate(exact[0, head])])
        wanted, _ = attend(query, keys, exact[1, head], 0.2)
        found = out[0, head].double().cpu().numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=3e-5)

        tail = np.random.default_rng(0).normal(size=(2, 7, 64))
        tail_out, tail_lse = attend(query, tail[0], tail[1], 0.2)
        share = 1 / (1 + np.exp(tail_lse - float(lse[0, head])))
        together = np.concatenate([keys, tail[0]]), np.concatenate([exact[1, head], tail[1]])
        wanted, _ = attend(query, *together, 0.2)
        merged = share * found + (1 - share) * tail_out
        np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=3e-5)


def test_queries_and_codes_may_be_strided() -> None:
    book, exact = random_book([21], 2, 32)
    stash = torch.zeros(*book.codes.shape[:3], 2 * book.codes.shape[3], dtype=torch.int16)
    stash = stash.to(DEVICE)
    stash[..., ::2] = book.codes
    queries = torch.randn(1, 9, 2, 32, device=DEVICE)[:, ::2, 1]  # [1, 5, 32]
    check(kernel, queries[:, :4], replace(book, codes=stash[..., ::2]), exact)


def test_packing_is_what_the_kernel_reads() -> None:
    """The docstring's example, and random codes against writing number by number."""
    row = pack_codes(
        torch.tensor([5, 7]), torch.tensor([40000, 0]), torch.tensor([1.5, 1.0]),
        torch.tensor([2.0, 0.5]), torch.tensor([65537, 3]), 13,
    )  # fmt: skip
    expected = [5, 7, -25536, 0, 15872, 15360, 16384, 14336, 1, 3, 1, 0, 0]
    assert row.dtype == torch.int16 and row.tolist() == [expected]
    found = unpack_codes(row, 2)
    assert [numbers.tolist() for numbers in found] == [
        [5, 7], [40000, 0], [1.5, 1.0], [2.0, 0.5], [65537, 3]
    ]  # fmt: skip
    assert unpack_codes(row, 1)[4].tolist() == [65537]
    for width, length in [(6, 3), (64, 1), (64, 23), (256, 64), (192, 65)]:
        codes = make_codes(3, length, 65536, torch.Generator().manual_seed(width), last=2**31 - 1)
        rows = pack_codes(*codes.values(), width)
        num_rows = rows.shape[1]
        wanted = torch.zeros(num_rows, 3, 1, width, dtype=torch.int16)  # [B, KV, N, W]
        write_codes(wanted, list(range(num_rows)), codes)
        assert torch.equal(rows, wanted[:, :, 0].transpose(0, 1))
        unpacked = unpack_codes(rows, length)
        for numbers, given in zip(unpacked, codes.values(), strict=True):
            assert numbers.tolist() == given.tolist()


def test_lengths_beyond_float16_become_its_largest() -> None:
    one = torch.zeros(1, dtype=torch.int32)
    row = pack_codes(one, one, torch.tensor([1e6]), torch.tensor([2.0]), one, 6)
    assert unpack_codes(row, 1)[2].tolist() == [65504.0]


def test_tokens_per_row() -> None:
    assert [codes_per_row(width) for width in (6, 11, 12, 64, 128, 192, 256)] == [
        1, 1, 2, 8, 16, 32, 32
    ]  # fmt: skip
    with pytest.raises(ValueError, match="row of 5 int16 is too short"):
        codes_per_row(5)


def test_refuses_what_does_not_fit() -> None:
    book, _ = random_book([5, 5])
    queries, freq = make_queries(2, 4, 64), frequencies(64)
    for module in (kernel, torch_version):
        attention = module.codebook_attention
        with pytest.raises(ValueError, match="do not fit 2 requests"):
            attention(make_queries(3, 4, 64), book, freq, True, 1.0)
        with pytest.raises(ValueError, match="no multiple of 2 KV heads"):
            attention(make_queries(2, 3, 64), book, freq, True, 1.0)
        with pytest.raises(ValueError, match="no int16 view"):
            attention(queries, replace(book, codes=book.codes.int()), freq, True, 1.0)
        with pytest.raises(ValueError, match="33 frequencies"):
            attention(queries, book, frequencies(66), True, 1.0)
    with pytest.raises(ValueError, match="neighbours"):
        kernel.codebook_attention(make_queries(2, 4, 128)[..., ::2], book, freq, True, 1.0)


def sm90_launches() -> None:
    """Llama-3-8B's shapes in 32, 16 and 8 bits, interleaved pairs, partial rotation, wide rows."""
    for heads, head_dim, rotary_dim, is_neox, dtype in [
        (32, 128, 128, True, torch.float32),
        (32, 128, 128, True, torch.bfloat16),
        (32, 128, 128, True, torch.float8_e4m3fn),
        (32, 128, 128, False, torch.bfloat16),
        (32, 128, 64, True, torch.bfloat16),
        (8, 256, 256, True, torch.bfloat16),
    ]:
        book, _ = random_book([64], 8, head_dim, dtype=dtype)
        book = replace(book, max_tokens=16384)
        query_dtype = dtype if dtype.itemsize > 1 else torch.bfloat16
        queries = make_queries(1, heads, head_dim, query_dtype)
        kernel.codebook_attention(queries, book, frequencies(rotary_dim), is_neox, 0.1)

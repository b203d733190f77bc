"""What the kernel benchmark launches, and on which made-up data.

Every function takes a shape, a device and a random generator and returns a `Case`: one launch of a
kernel, and the torch version on the same tensors. Blocks of a request are scattered over the cache;
entries of block tables that must not be followed name no block. Rows of caches are normal noise.

Imports nothing outside torch and ``vllm_kvcompress.kernels``.

Dimensions: R requests (batch), L layers, H query heads, KV key-value heads, D head_dim, C = 2 D,
N slots per block, n tokens of a prompt, K kept tokens, w queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch.nn.functional import normalize, pad

from vllm_kvcompress.kernels.block_tables import BlockTables
from vllm_kvcompress.kernels.layer_caches import LayerCaches
from vllm_kvcompress.kernels.pages import Pages
from vllm_kvcompress.kernels.rotary import Rotary

KEPT = 0.12
GROUPS = 4  # KV cache groups of a step, as the preset windowkv makes them
RING = 64  # queries that a request keeps
CHUNK = 8192  # tokens of a prompt that a step computes
SINKS, LAG, WINDOW = 4, 128, 32
ENTRIES, THRESHOLD = 512, 0.9  # of a codebook
OUTSIDE = 10**8  # no block of any cache


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement.

    Attributes
    ----------
    tokens, batch : int
        n and R.
    layers : int
        L, for what works on all layers at once.
    layout : {"LBNHC", "LBHNC"}
        Physical order of a layer's cache; the first is what vLLM chooses for FlashAttention.
    ragged : bool
        Every request 17 tokens shorter than the one before, for checks.
    """

    tokens: int
    batch: int
    layers: int = 1
    kv_heads: int = 8
    heads: int = 32
    head_dim: int = 128
    block: int = 16
    dtype: torch.dtype = torch.bfloat16
    layout: str = "LBNHC"
    ragged: bool = False

    @property
    def lengths(self) -> list[int]:
        """Tokens of every request."""
        return [self.tokens - 17 * r * self.ragged for r in range(self.batch)]

    @property
    def row(self) -> int:
        """Bytes of one token's keys in one layer, all KV heads."""
        return self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def kept(self) -> int:
        """K of the longest request."""
        return self.kept_of(self.tokens)

    def kept_of(self, tokens: int) -> int:
        """Survivors of so many tokens, in whole blocks."""
        return -(-int(tokens * KEPT) // self.block) * self.block

    @property
    def scale(self) -> float:
        """Softmax scale."""
        return self.head_dim**-0.5


@dataclass(frozen=True)
class Case:
    """A launch and its torch version.

    Attributes
    ----------
    kernel, reference : callable
        Launch; both return their outputs, or write them in place.
    outputs : callable or None
        Makes what is compared out of what a launch returned, as copies; None compares that itself.
    spoil : callable or None
        Overwrites what a launch fills in place.
    """

    kernel: Callable[[], Any]
    reference: Callable[[], Any]
    outputs: Callable[[Any], Sequence[torch.Tensor]] | None = None
    spoil: Callable[[], Any] | None = None


def _both(module: str, function: str, *args: Any, **more: Any) -> Case:
    """A kernel and its torch version, which have the same name and arguments."""
    names = (f"vllm_kvcompress.kernels.{module}", f"vllm_kvcompress.kernels.reference.{module}")
    versions = [partial(getattr(import_module(name), function), *args) for name in names]
    return Case(*versions, **more)


# --- caches -------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheSet:
    """L caches [B, KV, N, C], where R requests lie in them, and where survivors go."""

    layers: list[torch.Tensor]
    table: torch.Tensor  # [R, P]
    destination: torch.Tensor  # [R, Q]
    num_tokens: torch.Tensor
    num_keep: torch.Tensor
    shape: Shape

    def pages(self) -> Pages:
        """The first layer."""
        size, cache = self.shape.head_dim, self.layers[0]
        keys, values = cache[..., :size], cache[..., size:]
        return Pages(keys, values, self.table, self.num_tokens, self.shape.tokens)


def int32(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(list(numbers), dtype=torch.int32, device=device)


def storage(shape: Shape, blocks: int, generator: torch.Generator) -> torch.Tensor:
    """Noise [L, B, KV, N, C]."""
    order = (
        (shape.kv_heads, shape.block) if shape.layout == "LBHNC" else (shape.block, shape.kv_heads)
    )
    noise = torch.randn(
        shape.layers, blocks, *order, 2 * shape.head_dim,
        generator=generator, device=generator.device, dtype=shape.dtype,
    )  # fmt: skip
    return noise if shape.layout == "LBHNC" else noise.transpose(2, 3)


def scattered_tables(
    counts: Sequence[Sequence[int]], generator: torch.Generator
) -> list[torch.Tensor]:
    """Block tables with so many entries per row, all blocks different and scattered."""
    order = torch.randperm(
        sum(map(sum, counts)), generator=generator, device=generator.device, dtype=torch.int32
    )
    tables = []
    for rows in counts:
        table = order.new_full((len(rows), max(rows)), OUTSIDE)
        for row, count in zip(table, rows, strict=True):
            row[:count], order = order[:count], order[count:]
        tables.append(table)
    return tables


def make_cache(shape: Shape, generator: torch.Generator) -> CacheSet:
    kept = [shape.kept_of(length) for length in shape.lengths]
    counts = [[-(-n // shape.block) for n in each] for each in (shape.lengths, kept)]
    table, destination = scattered_tables(counts, generator)
    layers = list(storage(shape, sum(map(sum, counts)), generator))
    num_tokens, num_keep = (int32(each, generator.device) for each in (shape.lengths, kept))
    return CacheSet(layers, table, destination, num_tokens, num_keep, shape)


def random_queries(shape: Shape, generator: torch.Generator, *sizes: int) -> torch.Tensor:
    return torch.randn(
        *sizes, shape.heads, shape.head_dim,
        generator=generator, device=generator.device, dtype=shape.dtype,
    )  # fmt: skip


def frequencies(shape: Shape, device: torch.device) -> torch.Tensor:
    pairs = torch.arange(0, shape.head_dim, 2, device=device)
    return 500000.0 ** (-pairs / shape.head_dim)


# --- scores, selection, compaction --------------------------------------------------------


def token_scores(shape: Shape, generator: torch.Generator, window: int) -> Case:
    """Attention of the last `window` tokens."""
    queries = random_queries(shape, generator, shape.batch, window)
    pages = make_cache(shape, generator).pages()
    return _both("window_scores", "token_scores", queries, pages, shape.scale)


def window_scores(shape: Shape, generator: torch.Generator, window: int) -> Case:
    """The same, averaged over windows of 32 tokens."""
    queries = random_queries(shape, generator, shape.batch, window)
    pages = make_cache(shape, generator).pages()
    return _both("window_scores", "window_scores", queries, pages, shape.scale, WINDOW)


def key_similarity(shape: Shape, generator: torch.Generator) -> Case:
    """KeyDiff's cosines."""
    return _both("key_scores", "key_similarity", make_cache(shape, generator).pages())


def key_redundancy(shape: Shape, generator: torch.Generator) -> Case:
    """R-KV's redundancy of random keys: few have a similar one, so the search is a long one."""
    return _both("key_redundancy", "key_redundancy", make_cache(shape, generator).pages(), 0.5)


def prompt_attention(shape: Shape, generator: torch.Generator) -> Case:
    """H2O's sums of the last chunk of a prompt."""
    count = min(*shape.lengths, CHUNK)
    queries = random_queries(shape, generator, shape.batch, count)
    pages = make_cache(shape, generator).pages()
    return _both("prompt_attention", "prompt_attention_sums", queries, pages, shape.scale)


def lag_scores(shape: Shape, generator: torch.Generator) -> Case:
    """LagKV's scores."""
    return _both("key_scores", "lag_scores", make_cache(shape, generator).pages(), SINKS, LAG)


def select_tokens(shape: Shape, generator: torch.Generator) -> Case:
    """12 % of random scores, sinks and the last 16 tokens forced."""
    device = generator.device
    scores = torch.randn(
        shape.layers, shape.batch, shape.kv_heads, shape.tokens, generator=generator, device=device
    )
    forced = torch.zeros(shape.batch, shape.tokens, dtype=torch.bool, device=device)
    for row, length in zip(forced, shape.lengths, strict=True):
        row[:SINKS] = row[length - 16 : length] = True
    keep = int32([shape.kept_of(n) for n in shape.lengths], device)
    lengths = int32(shape.lengths, device)
    return _both("select_tokens", "select_tokens", scores, forced, lengths, keep, shape.kept)


def random_survivors(shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """[L, R, KV, K] ascending random tokens; -1 behind a request's last."""
    device = generator.device
    out = torch.full(
        (shape.layers, shape.batch, shape.kv_heads, shape.kept), -1, device=device
    )  # int64
    for layer in out:
        for request, length in enumerate(shape.lengths):
            noise = torch.rand(shape.kv_heads, length, generator=generator, device=device)
            kept = shape.kept_of(length)
            layer[request, :, :kept] = noise.topk(kept, dim=1).indices.sort(dim=1).values
    return out


def compact_pages(shape: Shape, generator: torch.Generator, rotates: bool) -> Case:
    """12 % of the rows of all layers to other blocks."""
    cache = make_cache(shape, generator)
    args: list[Any] = [
        LayerCaches.of(cache.layers, shape.head_dim), cache.table, cache.destination,
        random_survivors(shape, generator), cache.num_keep,
    ]  # fmt: skip
    if rotates:
        rotary = Rotary(frequencies(shape, generator.device), is_neox=True)
        args += [cache.num_tokens - cache.num_keep, rotary]
    blocks = cache.destination[cache.destination != OUTSIDE].long()
    return _both(
        "compact_pages", "compact_pages", *args,
        outputs=lambda _: [layer[blocks] for layer in cache.layers],
        spoil=lambda: [layer.index_fill_(0, blocks, float("nan")) for layer in cache.layers],
    )  # fmt: skip


# --- step bookkeeping ---------------------------------------------------------------------


def physical_slots(shape: Shape, generator: torch.Generator, decodes: bool) -> Case:
    """All prompts in one step, or one token of every request after its compaction."""
    device, num_rows = generator.device, shape.batch + 3
    counts = [[-(-shape.tokens // shape.block) + 1] * num_rows] * GROUPS
    tables = BlockTables.of(scattered_tables(counts, generator), [shape.block] * GROUPS)
    evicted = torch.zeros(GROUPS, num_rows, dtype=torch.int32, device=device)
    if decodes:
        evicted += shape.tokens - shape.kept
        positions = torch.tensor(shape.lengths, device=device)
        starts = range(shape.batch + 1)
    else:
        positions = torch.cat([torch.arange(n, device=device) for n in shape.lengths])
        starts = [0, *torch.tensor(shape.lengths).cumsum(0).tolist()]  # type: ignore[assignment]
    mapping = torch.randperm(num_rows, generator=generator, device=device)[: shape.batch]
    out = torch.empty(GROUPS, len(positions), dtype=torch.int64, device=device)
    return _both(
        "step_slots", "physical_slots",
        positions, int32(starts, device), mapping.int(), evicted, tables, out,
        outputs=lambda _: [out.clone()],
        spoil=lambda: out.fill_(-99),
    )  # fmt: skip


def store_rows(shape: Shape, generator: torch.Generator, decodes: bool) -> Case:
    """Queries, a slice of a fused projection, to the ring: the last 64 of a prompt, or one."""
    device, lengths = generator.device, [1] * shape.batch if decodes else shape.lengths
    width = shape.heads + 2 * shape.kv_heads
    fused = torch.randn(
        sum(lengths), width, shape.head_dim, generator=generator, device=device, dtype=shape.dtype
    )
    slots = []
    for request, length in enumerate(lengths):
        own = torch.arange(length, device=device)
        ring = request * RING + own % RING
        slots.append(ring.where(own >= length - RING, -1))
    out = torch.empty(
        shape.batch * RING, shape.heads, shape.head_dim, dtype=shape.dtype, device=device
    )
    return _both(
        "store_rows", "store_rows", fused[:, : shape.heads], torch.cat(slots), out,
        outputs=lambda _: [out.clone()],
        spoil=lambda: out.fill_(7.0),  # rows without a slot stay, and NaN would equal nothing
    )  # fmt: skip


# --- codebooks ----------------------------------------------------------------------------


def build_codebook(shape: Shape, generator: torch.Generator) -> Case:
    """Keys and values of one layer, n vectors per KV head around n / 4 directions.

    Cosines are far above the threshold around one direction and far below it between two, so that
    rounding decides nothing.
    """
    device, problems = generator.device, 2 * shape.batch * shape.kv_heads
    n, size = shape.tokens, shape.head_dim

    def noise(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    centers = normalize(noise(problems, max(n // 4, 1), size), dim=2)
    chosen = torch.randint(centers.shape[1], (problems, n), generator=generator, device=device)
    vectors = centers.gather(1, chosen[:, :, None].expand(-1, -1, size))
    vectors = vectors + 0.1 * normalize(noise(problems, n, size), dim=2)
    vectors = (vectors * (1 + noise(problems, n, 1).abs())).to(shape.dtype)
    counts = int32(shape.lengths * (problems // shape.batch), device)
    case = _both("codebook_build", "build_codebook", vectors, counts, THRESHOLD, n)
    return replace(case, outputs=lambda book: [getattr(book, f.name) for f in fields(book)])


def codebook_attention(shape: Shape, generator: torch.Generator) -> Case:
    """One query per request over n tokens that are entries of books of 512."""
    packed = import_module("vllm_kvcompress.kernels.codes").pack_codes
    kernel = import_module("vllm_kvcompress.kernels.codebook_attention")
    device, width = generator.device, shape.head_dim * shape.dtype.itemsize
    per_row = import_module("vllm_kvcompress.kernels.code_rows").codes_per_row(width)
    rows = [-(-n // per_row) for n in shape.lengths]
    entries = [ENTRIES - request * shape.ragged for request in range(shape.batch)]
    counts = [[-(-n // shape.block) for n in each] for each in (entries, rows)]
    book_table, code_table = scattered_tables(counts, generator)
    cache = storage(replace(shape, layers=1), sum(map(sum, counts)), generator)[0]
    halves = cache[..., : shape.head_dim], cache[..., shape.head_dim :]
    for half in halves:
        half.copy_(normalize(half.float(), dim=-1))
    codes = cache.view(torch.int16)
    for request, (length, count) in enumerate(zip(shape.lengths, entries, strict=True)):
        sizes = (shape.kv_heads, length)
        index = [torch.randint(count, sizes, generator=generator, device=device) for _ in range(2)]
        lengths = [
            shape.head_dim**0.5 * (0.5 + torch.rand(sizes, generator=generator, device=device))
            for _ in range(2)
        ]
        positions = torch.arange(length, device=device).expand(sizes)
        found = packed(*index, *lengths, positions, codes.shape[3])  # [KV, rows, W]
        found = pad(found, (0, 0, 0, -found.shape[1] % shape.block))
        blocks = code_table[request, : counts[1][request]].long()
        codes[blocks] = found.unflatten(1, (-1, shape.block)).transpose(0, 1)
    pages = Pages(*halves, book_table, int32(entries, device), max(entries))
    book = kernel.CodebookPages(
        pages, codes, code_table, int32(shape.lengths, device), shape.tokens
    )
    return _both(
        "codebook_attention", "codebook_attention",
        random_queries(shape, generator, shape.batch), book, frequencies(shape, device), True,
        shape.scale,
    )  # fmt: skip

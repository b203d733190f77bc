"""Memory of one request before and after compression: arithmetic only, no torch, no vLLM.

All bytes are those of one worker (tensor-parallel rank). Layers that share a block table are laid
out as vLLM 0.32 lays out a hybrid model: a block of the pool holds `block_size` tokens of
`layers_per_block` layers, and every block table takes whole blocks.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.kernels.codebook.format import codes_per_row
from vllm_kvcompress.lengths.budgets import (
    after_compaction,
    compaction_lengths,
    layer_groups,
    next_lengths,
    permanent_ranges,
)
from vllm_kvcompress.lengths.geometry import ModelGeometry
from vllm_kvcompress.plans import GroupCache, GroupLengths

_UNITS = {"": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
_UNITS |= {"B": 1, **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}}


def parse_size(text: str) -> int:
    """Bytes of "40GiB", "1.5 GB" or "42949672960".

    Raises
    ------
    ConfigError
        If it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-zA-Z]*)", text.strip())
    unit = match and {name.lower(): size for name, size in _UNITS.items()}.get(match[2].lower())
    if not match or unit is None or (size := int(float(match[1]) * unit)) < 1:
        raise ConfigError(f"{text!r} is not a size; allowed are 40GiB, 40GB or a number of bytes.")
    return size


def format_size(num_bytes: int) -> str:
    """Bytes in the largest binary unit that leaves a number of at least 1."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:.1f} {unit}"
    return f"{num_bytes} B"


# --- the pool -----------------------------------------------------------------------------


def block_tables(group_of_layer: Sequence[int]) -> tuple[list[int], int]:
    """Number of block tables of every layer group, and how many layers wide a block is.

    vLLM gives all tables blocks of one width: that of the smallest layer group, or of the largest
    where that is less than 1.5 times the smallest. Wider groups are split over several tables;
    what a table leaves empty in its blocks is wasted.
    """
    sizes = [group_of_layer.count(group) for group in range(max(group_of_layer) + 1)]
    width = max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)
    return [-(-size // width) for size in sizes], width


@dataclass(frozen=True)
class GroupUsage:
    """One layer group of one request, on one worker.

    Attributes
    ----------
    layer_group, first_layer, num_layers, num_tables : int
        Its number, its layers, and the block tables they are spread over.
    tokens_before, tokens_after : int
        Slots in use per layer before and after the first compaction: one per token, fewer where a
        codebook stands for tokens.
    tokens_attended : int
        Tokens that a decode step attends to per layer after it, coded ones included.
    blocks_before, blocks_after : int
        Blocks of the pool, all tables.
    """

    layer_group: int
    first_layer: int
    num_layers: int
    num_tables: int
    tokens_before: int
    tokens_after: int
    tokens_attended: int
    blocks_before: int
    blocks_after: int


@dataclass(frozen=True)
class RequestUsage:
    """One request, on one worker. All blocks are blocks of the pool.

    Attributes
    ----------
    groups : tuple[GroupUsage, ...]
        One entry per layer group, in order.
    compacted_at : int or None
        Sequence length of the first compaction; None if there is none.
    block_bytes : int
        Bytes of one block.
    padding : float
        Share of the pool that no layer uses, in [0, 1).
    blocks_before, blocks_after : int
        Held before and after the first compaction.
    blocks_peak : int
        Most that are held at once: old blocks and the copy of the survivors, for one step.
    blocks_prompt, blocks_decoding : int
        Held when the prompt is done, and at most from the first compaction to the last token.
    stock_block_bytes, stock_blocks_prompt, stock_blocks_decoding : int
        The same without compression: one block table for all layers.
    """

    groups: tuple[GroupUsage, ...]
    compacted_at: int | None
    block_bytes: int
    padding: float
    blocks_before: int
    blocks_after: int
    blocks_peak: int
    blocks_prompt: int
    blocks_decoding: int
    stock_block_bytes: int
    stock_blocks_prompt: int
    stock_blocks_decoding: int

    def size(self, num_blocks: int) -> str:
        """Bytes of so many blocks, for people."""
        return format_size(num_blocks * self.block_bytes)


@dataclass(frozen=True)
class _Compaction:
    position: int
    before: list[GroupCache]
    after: list[GroupCache]
    lengths: list[GroupLengths | None]


def _compactions(
    prompt_len: int,
    output_len: int,
    config: CompressionConfig,
    num_groups: int,
    block_size: int,
    codes: int,
) -> Iterator[_Compaction]:
    """Every compaction of a request, in order, as the planner will decide them."""
    position = prompt_len
    before = [GroupCache(prompt_len, permanent_ranges(prompt_len, config))] * num_groups
    lengths = compaction_lengths(prompt_len, config, num_groups, block_size, codes)
    runs_on = config.compresses_while_decoding or config.extends_codebooks
    while True:
        pairs = list(zip(before, lengths, strict=True))
        after = [after_compaction(cache, each) if each else cache for cache, each in pairs]
        if any(lengths):
            yield _Compaction(position, before, after, lengths)
        position += config.interval
        if not runs_on or position > prompt_len + output_len:
            return
        before = [replace(c, num_tokens=c.num_tokens + config.interval) for c in after]
        lengths = next_lengths(prompt_len, position, before, config, block_size, codes)


def _attended(cache: GroupCache) -> int:
    """Tokens whose keys and values a group's slots stand for."""
    book = cache.book
    return cache.num_tokens if book is None else cache.num_tokens - book.num_slots + book.num_tokens


def request_usage(
    geometry: ModelGeometry,
    config: CompressionConfig,
    prompt_len: int,
    output_len: int = 0,
    block_size: int = 16,
    tensor_parallel_size: int = 1,
) -> RequestUsage:
    """Work out what one request holds before, during and after its compactions."""
    group_of_layer = layer_groups(geometry.num_layers, config.layer_groups)
    tables, width = block_tables(group_of_layer)
    page = geometry.page_bytes(block_size, tensor_parallel_size)

    def blocks(tokens: Iterable[int]) -> int:
        return sum(n * -(-each // block_size) for n, each in zip(tables, tokens, strict=True))

    end = prompt_len + output_len
    codes = codes_per_row(geometry.head_dim * geometry.cache_bytes)
    done = list(_compactions(prompt_len, output_len, config, len(tables), block_size, codes))
    peaks, grown = [blocks([end if not done else prompt_len] * len(tables))], []
    for index, each in enumerate(done):
        held = blocks(cache.num_tokens for cache in each.before)
        peaks.append(held + blocks(lens.kept_len if lens else 0 for lens in each.lengths))
        until = done[index + 1].position if index + 1 < len(done) else end
        grown.append(blocks(c.num_tokens + until - each.position for c in each.after))
    before = [c.num_tokens for c in done[0].before] if done else [prompt_len] * len(tables)
    after = [c.num_tokens for c in done[0].after] if done else before
    attended = [_attended(c) for c in done[0].after] if done else before
    groups = tuple(
        GroupUsage(
            layer_group=group,
            first_layer=group_of_layer.index(group),
            num_layers=group_of_layer.count(group),
            num_tables=count,
            tokens_before=before[group],
            tokens_after=after[group],
            tokens_attended=attended[group],
            blocks_before=count * -(-before[group] // block_size),
            blocks_after=count * -(-after[group] // block_size),
        )
        for group, count in enumerate(tables)
    )
    return RequestUsage(
        groups=groups,
        compacted_at=done[0].position if done else None,
        block_bytes=page * width,
        padding=1 - geometry.num_layers / (sum(tables) * width),
        blocks_before=blocks(before),
        blocks_after=blocks(after),
        blocks_peak=max(peaks),
        blocks_prompt=blocks([prompt_len] * len(tables)),
        blocks_decoding=max(grown, default=peaks[0]),
        stock_block_bytes=page * geometry.num_layers,
        stock_blocks_prompt=-(-prompt_len // block_size),
        stock_blocks_decoding=-(-end // block_size),
    )


@dataclass(frozen=True)
class Capacity:
    """How many requests of one kind are in a pool at once; prefix-cache hits are not counted.

    Attributes
    ----------
    stock_prompts, prompts : int
        Whole prompts, without and with compression: a prompt is admitted only when all of it fits.
    stock_decoding, decoding : int
        Requests that hold all their output tokens.
    one_by_one : int
        Requests that can be decoding when they are admitted one after another, so that the last
        one passes through its peak beside the others. 0 if one alone is too much.
    """

    stock_prompts: int
    prompts: int
    stock_decoding: int
    decoding: int
    one_by_one: int


def capacity(usage: RequestUsage, memory: int) -> Capacity:
    """Fill a pool of `memory` bytes per worker; vLLM keeps one block back."""
    stock = max(memory // usage.stock_block_bytes - 1, 0)
    pool = max(memory // usage.block_bytes - 1, 0)
    decoding = pool // usage.blocks_decoding
    room = pool - usage.blocks_peak
    return Capacity(
        stock_prompts=stock // usage.stock_blocks_prompt,
        prompts=pool // usage.blocks_prompt,
        stock_decoding=stock // usage.stock_blocks_decoding,
        decoding=decoding,
        one_by_one=min(1 + room // usage.blocks_decoding, decoding) if room >= 0 else 0,
    )

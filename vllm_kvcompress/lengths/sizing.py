"""Memory of one request before and after compression: arithmetic only, no torch, no vLLM.

All bytes are those of one worker (tensor-parallel rank). Layers that share a block table are laid
out as vLLM 0.32 lays out a hybrid model: a block of the pool holds `block_size` tokens of
`layers_per_block` layers, and every block table takes whole blocks.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.kernels.codebook.format import codes_per_row
from vllm_kvcompress.lengths.budgets import layer_groups
from vllm_kvcompress.lengths.geometry import ModelGeometry
from vllm_kvcompress.lengths.longest_peak import longest_prompt_peak
from vllm_kvcompress.lengths.peak import peak_tokens
from vllm_kvcompress.lengths.schedule import compactions, first_kept
from vllm_kvcompress.plans import GroupCache

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
        codebook stands for tokens. With compressions inside the prompt: of the whole prompt, and
        behind the compaction at its end.
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
        Sequence length of the first compaction that is not inside the prompt; None if there is
        none.
    block_bytes : int
        Bytes of one block.
    padding : float
        Share of the pool that no layer uses, in [0, 1).
    blocks_before, blocks_after : int
        Held before and after the first compaction.
    blocks_peak, blocks_needed : int
        Most that are held at once: old blocks and the copy of the survivors, for one step; and in
        a pool without room for the copy, where survivors overwrite blocks of the request.
    blocks_prompt, blocks_decoding : int
        Most that are held until the prompt is done, without the copy of the survivors, and from
        the first compaction to the last token.
    blocks_reserved : int
        Free blocks that its first compaction needs where others hold all of its blocks, too: set
        aside with the setting's `shared_blocks: always` for each that shares blocks, but for one.
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
    blocks_needed: int
    blocks_prompt: int
    blocks_decoding: int
    blocks_reserved: int
    stock_block_bytes: int
    stock_blocks_prompt: int
    stock_blocks_decoding: int

    def size(self, num_blocks: int) -> str:
        """Bytes of so many blocks, for people."""
        return format_size(num_blocks * self.block_bytes)


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
    shape = len(tables), block_size, codes
    done = list(compactions(prompt_len, end, config, *shape))
    whole_prompt = [prompt_len] * len(tables)
    prompt = peak_tokens(prompt_len, prompt_len, config, *shape)
    held, grown = [blocks(prompt) if done else blocks([end] * len(tables))], []
    copied = [0]
    for index, each in enumerate(done):
        held.append(blocks(cache.num_tokens for cache in each.before))
        copied.append(blocks(lens.kept_len if lens else 0 for lens in each.lengths))
        until = done[index + 1].position if index + 1 < len(done) else end
        if each.position >= prompt_len:
            grown.append(blocks(c.num_tokens + until - each.position for c in each.after))
    # Compactions inside the prompt lead up to the one that is shown.
    done = [each for each in done if each.position >= prompt_len]
    before = [c.num_tokens for c in done[0].before] if done else whole_prompt
    if config.compresses_in_prompts:
        before = whole_prompt
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
        blocks_peak=max(own + copy for own, copy in zip(held, copied, strict=True)),
        blocks_needed=max(held + grown),
        blocks_prompt=blocks(prompt),
        blocks_decoding=max(grown, default=held[0]),
        blocks_reserved=blocks(first_kept(prompt_len, end, config, *shape)),
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
        one passes through its prompt beside the others. 0 if one alone is too much.
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
    room = pool - usage.blocks_needed
    return Capacity(
        stock_prompts=stock // usage.stock_blocks_prompt,
        prompts=pool // usage.blocks_prompt,
        stock_decoding=stock // usage.stock_blocks_decoding,
        decoding=decoding,
        one_by_one=min(1 + room // usage.blocks_decoding, decoding) if room >= 0 else 0,
    )


def longest_prompts(
    geometry: ModelGeometry,
    config: CompressionConfig,
    memory: int,
    block_size: int = 16,
    tensor_parallel_size: int = 1,
) -> tuple[int, int]:
    """Tokens of the longest prompts that a pool of `memory` bytes per worker holds.

    Without and with compression; at most the model's longest sequence, if that is known.
    """
    tables, width = block_tables(layer_groups(geometry.num_layers, config.layer_groups))
    page = geometry.page_bytes(block_size, tensor_parallel_size)
    stock, pool = (max(memory // (page * n) - 1, 0) for n in (geometry.num_layers, width))
    most = geometry.max_positions or 2**20

    def fits(length: int) -> bool:
        peaks = longest_prompt_peak(length, config, len(tables), block_size)
        return sum(n * -(-p // block_size) for n, p in zip(tables, peaks, strict=True)) <= pool

    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return min(stock * block_size, most), low

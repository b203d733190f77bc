"""Right answers against bytes kept: exact sizes of compressed prompts, settings of equal bytes.

Bytes are slots that a compacted prompt holds, in whole blocks, its uncompressed tail and every slot
for entries and codes included, times what a slot takes. A slot is one token's key and value in
every KV head of a layer, so shares of the whole cache depend on the model in one place only: how
many tokens' codes one slot takes (``kernels/code_rows.py``).
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.kernels.code_rows import codes_per_row
from vllm_kvcompress.lengths.budgets import (
    after_compaction,
    compaction_lengths,
    layer_groups,
    permanent_ranges,
)
from vllm_kvcompress.plans import GroupCache, GroupLengths

GRID = 500
"""Settings of equal bytes are looked for among ratios of 1/500, 2/500, ..., 1."""


@dataclass(frozen=True)
class Shape:
    """What sizes of a cache depend on.

    Attributes
    ----------
    num_layers, num_kv_heads, head_dim : int
        Of the model.
    element_bytes : int
        Of a cached number.
    block_size : int
        Slots per block.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int
    block_size: int

    @property
    def slot_bytes(self) -> int:
        """One slot of one layer, all KV heads."""
        return 2 * self.num_kv_heads * self.head_dim * self.element_bytes

    def lengths(self, num_tokens: int, config: CompressionConfig) -> list[GroupLengths | None]:
        """What becomes of a prompt, layer by layer."""
        group_of = layer_groups(self.num_layers, config.layer_groups)
        codes = codes_per_row(self.head_dim * self.element_bytes)
        count = max(group_of) + 1
        found = compaction_lengths(num_tokens, config, count, self.block_size, codes)
        return [found[group] for group in group_of]

    def whole_blocks(self, slots: int) -> int:
        """Slots of the blocks that hold so many."""
        return math.ceil(slots / self.block_size) * self.block_size

    def full_slots(self, num_tokens: int) -> int:
        """Slots of a prompt that nothing was taken from, all layers."""
        return self.num_layers * self.whole_blocks(num_tokens)

    def kept_slots(self, num_tokens: int, config: CompressionConfig | None) -> int:
        """Slots of a prompt after its compaction, all layers; None compacts nothing."""
        if config is None:
            return self.full_slots(num_tokens)
        cache = GroupCache(num_tokens, permanent_ranges(num_tokens, config))
        held = [
            num_tokens if each is None else after_compaction(cache, each).num_tokens
            for each in self.lengths(num_tokens, config)
        ]
        return sum(map(self.whole_blocks, held))

    def share(self, prompt_lens: Sequence[int], config: CompressionConfig | None) -> float:
        """Bytes kept of several prompts over the bytes of their uncompressed cache."""
        counts = Counter(prompt_lens)
        kept = sum(self.kept_slots(length, config) * count for length, count in counts.items())
        return kept / sum(self.full_slots(length) * count for length, count in counts.items())


@dataclass(frozen=True)
class Method:
    """A preset, what is changed in it, and the one field that decides how many bytes it keeps.

    Attributes
    ----------
    name, preset : str
        What it is called in results; the preset it starts from.
    changes : mapping
        Fields laid over the preset.
    varies : {"ratio", "entries"}
        `budget.ratio`, or `codebook.entries` where all tokens are kept.
    """

    name: str
    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    varies: Literal["ratio", "entries"] = "ratio"

    def setting(self, value: float) -> CompressionConfig:
        """The setting at a ratio or a share of entries, for prompts that ask for one number.

        One layer group per layer, and no floor: it would make small budgets the same setting.
        """
        varied: dict[str, Any] = {"budget": {"ratio": value, "floor": 1}}
        if self.varies == "entries":
            varied = {"budget": {"ratio": 1.0, "floor": 1}, "codebook": {"entries": value}}
        base = {"preset": self.preset, "layer_groups": {"size": 1}, "trigger": "end_of_prompt"}
        changes = {**self.changes}
        for name, fields in varied.items():
            changes[name] = {**changes.get(name, {}), **fields}
        config = parse_config(base, changes)
        assert config is not None
        return config.by_task["localization"] if config.tasks else config


@dataclass(frozen=True)
class Point:
    """One setting of a method and what it keeps of some prompts.

    Attributes
    ----------
    budget : float
        Share of the bytes that was asked for.
    value : float
        The ratio or share of entries that comes nearest to it without exceeding it.
    share : float
        Share of the bytes that it keeps.
    config : CompressionConfig or None
        The setting; None keeps everything.
    """

    budget: float
    value: float
    share: float
    config: CompressionConfig | None


def points(
    method: Method, budgets: Sequence[float], prompt_lens: Sequence[int], shape: Shape
) -> list[Point]:
    """Settings of one method that keep as much as possible and no more than each budget.

    More tokens, or more entries, never take fewer slots. Of settings that keep the same bytes the
    one with the largest value is taken: it keeps more tokens in them. Budgets that get the setting
    of a smaller budget are left out, as are those below what protected tokens take. Nothing but
    lengths decides.
    """

    @cache
    def share(step: int) -> float:
        return shape.share(prompt_lens, method.setting(step / GRID))

    found: list[Point] = []
    steps = range(1, GRID + 1)
    taken = 0
    for budget in sorted(budgets):
        step = bisect_right(steps, budget, key=share)
        if step > taken:
            value = step / GRID
            found.append(Point(budget, value, share(step), method.setting(value)))
            taken = step
    return found


def paper_share(
    shape: Shape,
    num_tokens: int,
    config: CompressionConfig | None,
    num_entries: Sequence[torch.Tensor | None],
) -> float:
    """What SpindleKV's own formula calls the ratio (arXiv 2507.06517): mean of r1 r2 r3 of layers.

    r1 = kept tokens / tokens; r2 = entries / kept vectors; r3 = (D + 32 / bits of a number + 1) / D
    for a number and a length, which the formula charges per entry. In layers without a book r2 and
    r3 are 1; tokens behind a book are entries of their own.

    Parameters
    ----------
    num_tokens : int
        Of the prompt.
    num_entries : sequence of torch.Tensor or None
        Per layer [2, KV] entries in use; None without a book.
    """
    if config is None:
        return 1.0
    ratios = []
    for lengths, entries in zip(shape.lengths(num_tokens, config), num_entries, strict=True):
        if lengths is None:
            ratios.append(1.0)
            continue
        behind = num_tokens - lengths.region_len
        kept = lengths.num_survivors + behind
        ratio = kept / num_tokens
        if entries is not None:
            codes = 32 / (8 * shape.element_bytes) + 1
            shared = (float(entries.double().mean()) + behind) / kept
            ratio *= shared * (shape.head_dim + codes) / shape.head_dim
        ratios.append(ratio)
    return sum(ratios) / len(ratios)


def used_share(
    shape: Shape,
    num_tokens: int,
    config: CompressionConfig | None,
    num_entries: Sequence[torch.Tensor | None],
) -> float | None:
    """Entries in use over slots for entries; None without a book. Arguments as of `paper_share`."""
    if config is None:
        return None
    used = slots = 0.0
    for lengths, entries in zip(shape.lengths(num_tokens, config), num_entries, strict=True):
        if lengths is not None and lengths.book is not None and entries is not None:
            used += float(entries.double().mean())
            slots += lengths.book.num_entries
    return used / slots if slots else None


def right_digits(generated: str, answer: str) -> int:
    """Characters of the answer that are in their place, white space ignored."""
    text = "".join(generated.split())
    return sum(one == other for one, other in zip(text, answer, strict=False))


# --- results ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One point, measured.

    Attributes
    ----------
    method : str
        Its name.
    length : int
        Prompt length asked for, in tokens.
    point : Point
        The setting.
    kept_bytes, full_bytes : float
        Mean over prompts.
    other_share : float
        Share of the bytes in a cache of another shape.
    paper_share : float
        See the function of this name; mean over prompts.
    used_share : float or None
        See the function of this name; mean over prompts.
    digits : tuple of int
        Right digits per prompt.
    num_digits : int
        Digits of an answer.
    """

    method: str
    length: int
    point: Point
    kept_bytes: float
    full_bytes: float
    other_share: float
    paper_share: float
    used_share: float | None
    digits: tuple[int, ...]
    num_digits: int

    @property
    def right(self) -> int:
        """Prompts whose whole answer is right."""
        return sum(count == self.num_digits for count in self.digits)

    @property
    def digit_share(self) -> float:
        """Right digits over all digits."""
        return sum(self.digits) / (len(self.digits) * self.num_digits)


def best_within(cells: Sequence[Cell], budget: float) -> Cell | None:
    """The cell with the most bytes not above the budget; None if all are above."""
    inside = [cell for cell in cells if cell.point.share <= budget]
    return max(inside, key=lambda cell: cell.point.share, default=None)


@dataclass(frozen=True)
class Paired:
    """Two methods over the same prompts and budgets.

    Attributes
    ----------
    first, second : int
        Prompts that one alone answers right, summed over points.
    total : int
        Prompts, summed over points.
    digits : tuple[int, int]
        Right digits of either.
    """

    first: int
    second: int
    total: int
    digits: tuple[int, int]


def paired(first: Sequence[Cell], second: Sequence[Cell]) -> Paired:
    """Compare points of equal length and equal bytes.

    Raises
    ------
    ValueError
        If one of the methods has a point that the other has not.
    """
    one, other = _by_place(first), _by_place(second)
    if one.keys() != other.keys():
        raise ValueError(
            f"{first[0].method} and {second[0].method} have points at different bytes: they "
            "cannot be compared prompt by prompt"
        )
    both = [(one[place], other[place]) for place in one]
    return Paired(
        first=sum(_only(a, b) for a, b in both),
        second=sum(_only(b, a) for a, b in both),
        total=sum(len(a.digits) for a, _ in both),
        digits=(sum(sum(a.digits) for a, _ in both), sum(sum(b.digits) for _, b in both)),
    )


def _by_place(cells: Sequence[Cell]) -> dict[tuple[int, float], Cell]:
    return {(cell.length, cell.point.share): cell for cell in cells}


def _only(one: Cell, other: Cell) -> int:
    """Prompts that `one` answers right and `other` does not."""
    pairs = zip(one.digits, other.digits, strict=True)
    return sum(mine == one.num_digits > its for mine, its in pairs)

"""A prompt under a setting that compacts inside it.

Tokens behind a compaction see its survivors and not what was evicted, so that the prompt must be
computed anew for every such setting: part by part, up to each length at which it is compacted. The
whole cache of the prompt is never there, and nothing of it can be made up for later.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.evaluation.replay_compaction import due_lengths
from vllm_kvcompress.evaluation.replay_rows import KeptRows
from vllm_kvcompress.lengths.budgets import (
    after_compaction,
    evicting_marks,
    layer_groups,
    permanent_ranges,
)
from vllm_kvcompress.plans import GroupCache

if TYPE_CHECKING:
    from vllm_kvcompress.evaluation.replay import Prefilled, Replay


@dataclass(frozen=True)
class Held:
    """How far a prompt is computed under a setting, and what of it is there.

    Attributes
    ----------
    config : CompressionConfig
        The setting.
    seed : int
        Of policies that draw random numbers.
    position : int
        Tokens computed so far.
    caches : tuple[GroupCache, ...]
        By layer group, what it holds before the compaction that is due.
    positions : list[torch.Tensor]
        Per layer [KV, n] int64, of its keys and values.
    """

    config: CompressionConfig
    seed: int
    position: int
    caches: tuple[GroupCache, ...]
    positions: list[torch.Tensor]


def marks_of(replay: "Replay", length: int, config: CompressionConfig | None) -> tuple[int, ...]:
    """Lengths at which a prompt is compacted; () where that is its end alone, or never."""
    if config is None or not config.compresses_in_prompts:
        return ()
    groups = max(layer_groups(len(replay.full_layers), config.layer_groups)) + 1
    marks = evicting_marks(length, config, groups, replay.block_size)
    return () if len(marks) == 1 else marks


def computed_under(
    replay: "Replay", prompt: "Prefilled", config: CompressionConfig | None, seed: int
) -> "Prefilled":
    """The prompt as it stands when its end is to be compacted.

    That is the prompt itself where it is compacted at its end alone, or not at all. Its queries
    are those of the last part, which hold the last observation window.
    """
    token_ids = prompt.token_ids
    marks = marks_of(replay, len(token_ids), config)
    if not marks:
        return prompt if prompt.held is None else replay.prefill(token_ids)
    assert config is not None
    if prompt.held is not None and (prompt.held.config, prompt.held.seed) == (config, seed):
        return prompt
    groups = max(layer_groups(len(replay.full_layers), config.layer_groups)) + 1
    caches = (GroupCache(0, permanent_ranges(len(token_ids), config)),) * groups
    kept: list[KeptRows] = []
    states: dict[int, Any] = {}
    for start, end in pairwise((0, *marks)):
        part = replay.forward(token_ids[start:end], kept, start, states)
        grown = tuple(replace(each, num_tokens=each.num_tokens + end - start) for each in caches)
        positions = positions_of(part, kept, start, end)
        part = replace(part, token_ids=token_ids, held=Held(config, seed, end, grown, positions))
        states = part.states
        if end < len(token_ids):
            lengths = due_lengths(replay, part, config)
            kept = replay.kept(part, config, seed)
            caches = tuple(
                after_compaction(cache, each) if each else cache
                for cache, each in zip(grown, lengths, strict=True)
            )
    return part


def positions_of(
    part: "Prefilled", kept: Sequence[KeptRows], start: int, end: int
) -> list[torch.Tensor]:
    """Of every layer's rows: what was kept, then the new tokens; windowed layers hold the last."""
    found = []
    for layer, keys in enumerate(part.keys):
        heads, count = keys.shape[:2]
        new = torch.arange(start, end, device=keys.device).expand(heads, -1)
        rows = torch.cat([kept[layer].positions, new], dim=1) if kept else new
        found.append(rows[:, rows.shape[1] - count :])
    return found

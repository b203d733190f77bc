"""Layers of transformers' caches that hold a recurrent state in the place of keys and values.

Nothing of them is evicted. A replay decodes one prompt under many settings, and every decoding goes
on from a copy of the state that the prompt has left.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

Rows = tuple[torch.Tensor, torch.Tensor]


def has_rows(layer: Any) -> bool:
    """Whether a layer of a cache holds keys and values."""
    return isinstance(layer, CacheLayerMixin)


def rows_of(cache: Any) -> list[Rows]:
    """Keys and values [KV, n, D] of every layer of a cache of one prompt; n = 0 without any."""
    some = next(layer for layer in cache.layers if has_rows(layer))
    nothing = some.keys[0][:, :0], some.values[0][:, :0]
    return [(each.keys[0], each.values[0]) if has_rows(each) else nothing for each in cache.layers]


def states_of(cache: Any) -> dict[int, Any]:
    """Layers of a cache that hold a state, by number."""
    return {i: each for i, each in enumerate(cache.layers) if not has_rows(each)}


def with_states(cache: DynamicCache, states: dict[int, Any], rows: Sequence[Rows]) -> DynamicCache:
    """Fill an empty cache with copies of states, and of the rows of all other layers."""
    for number, (keys, values) in enumerate(rows):
        if number in states:
            cache.layers[number] = copy.deepcopy(states[number])
        else:
            cache.update(keys[None].clone(), values[None].clone(), number)
    return cache


def attention_of(layer: Any) -> Any:
    """The attention in a layer of a model."""
    return layer.mixer if hasattr(layer, "mixer") else layer.self_attn


def output_weight(attention: Any) -> torch.Tensor:
    """Weight [hidden_size, H * D] of an attention's output projection."""
    found = getattr(attention, "o_proj", None) or attention.out_proj
    return found.weight.detach()

"""What configurations call the layers of a model, in words that are ours.

Hugging Face has a word per layer in ``layer_types`` by now, but files on disk have older fields,
and families have words of their own. What each field means is in the configuration classes of
transformers 5 (``models/*/configuration_*.py``).
"""

from collections.abc import Callable, Sequence
from typing import Any

FULL, WINDOWED = "full_attention", "sliding_attention"
STATE, NO_CACHE = "linear_attention", "no cache"
"""`STATE`: a state of fixed size in the place of keys and values, as Mamba, linear attention and
short convolutions have it. `NO_CACHE`: neither, where feed-forward layers are counted too."""

_WORDS = {
    "attention": FULL,
    # Attention and Mamba side by side (Falcon-H1), or one behind the other (Zamba2).
    "hybrid": FULL,
    "mamba": STATE,
    "conv": STATE,
    "mlp": NO_CACHE,
    "moe": NO_CACHE,
}
_LETTERS = {"*": FULL, "M": STATE, "-": NO_CACHE, "E": NO_CACHE}
"""Of Nemotron-H's ``hybrid_override_pattern``."""


def named_layers(text: Any) -> tuple[str, ...] | None:
    """A word per layer: `FULL`, `WINDOWED`, `STATE`, `NO_CACHE`, or one that is not known here.

    Parameters
    ----------
    text : object
        Hugging Face configuration of the text model; attributes that are missing say nothing.

    Returns
    -------
    tuple[str, ...] or None
        None if the configuration does not tell its layers apart, or by windows alone.
    """
    for read in _READERS:
        found = read(text)
        if found is not None:
            return tuple(found)
    return None


def _words(text: Any) -> list[str] | None:
    for name in ("layer_types", "layers_block_type"):
        if named := getattr(text, name, None):
            return [_WORDS.get(each, each) for each in named]
    return None


def _letters(text: Any) -> list[str] | None:
    pattern = getattr(text, "hybrid_override_pattern", None)
    return [_LETTERS.get(each, each) for each in pattern] if pattern else None


def _indices(text: Any) -> list[str] | None:
    """Numbers of the attention layers: Bamba and LFM2."""
    for name in ("attn_layer_indices", "full_attn_idxs"):
        numbers = getattr(text, name, None)
        if isinstance(numbers, Sequence):
            return [FULL if i in numbers else STATE for i in range(text.num_hidden_layers)]
    return None


def _period(text: Any) -> list[str] | None:
    """One layer in so many: Jamba, and Qwen3-Next, where it is the last of them."""
    period = getattr(text, "attn_layer_period", None)
    offset = getattr(text, "attn_layer_offset", None)
    if period is None:
        period = getattr(text, "full_attention_interval", None)
        offset = period and period - 1
    if not isinstance(period, int) or not isinstance(offset, int) or period < 1:
        return None
    return [FULL if i % period == offset else STATE for i in range(text.num_hidden_layers)]


_READERS: tuple[Callable[[Any], list[str] | None], ...] = (_words, _letters, _indices, _period)


def turns_no_keys(text: Any) -> bool:
    """Whether attention has no rotary embedding, although the configuration may describe one.

    Jamba and Nemotron-H have none; of Granite 4 and OLMo hybrids the configuration says so.
    """
    kind = getattr(text, "model_type", None)
    if kind in ("jamba", "nemotron_h"):
        return True
    if kind == "granitemoehybrid":
        return getattr(text, "position_embedding_type", None) != "rope"
    if kind == "olmo_hybrid":
        rope = getattr(text, "rope_parameters", None)
        return not rope or rope.get("rope_theta") is None
    return False

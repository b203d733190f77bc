"""Which layers of a model can be compacted: those that attend to everything."""

from typing import Any

from vllm_kvcompress.lengths.layer_words import FULL, NO_CACHE, STATE, WINDOWED, named_layers

SERVED = frozenset({FULL, WINDOWED, STATE, NO_CACHE})
"""Kinds of layers that are compacted, or left to vLLM as they are."""

TRIED_HYBRIDS = (
    "GraniteMoeHybridForCausalLM",
    "Lfm2ForCausalLM",
    "NemotronHForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
)
"""Architectures with recurrent layers that were held against transformers; others are refused.

By ``tests/e2e/test_linear_layers.py`` and, where images are seen, ``test_multimodal.py``;
Nemotron-H and Qwen3.5 with experts by ``scripts/hybrid_tokens.py``."""


def layer_types(text: Any, max_len: int | None = None) -> tuple[str, ...]:
    """What each layer attends to, by the configuration of a language model.

    Parameters
    ----------
    text : object
        Hugging Face configuration of the text model; attributes that are missing say nothing.
    max_len : int or None
        Tokens of the longest sequence. A window that no sequence outgrows is none.

    Returns
    -------
    tuple[str, ...]
        One word per layer: of `SERVED`, or another that the configuration has.
    """
    count = text.num_hidden_layers
    window = getattr(text, "sliding_window", None)
    if not getattr(text, "use_sliding_window", True):
        window = None
    named = named_layers(text)
    if named is not None:
        found = named
    elif pattern := _pattern(text):
        # One layer in so many attends to everything, the last of them.
        found = tuple(FULL if (i + 1) % pattern == 0 else WINDOWED for i in range(count))
    else:
        found = (WINDOWED,) * count
    if not window or (max_len is not None and window >= max_len):
        return tuple(FULL if each == WINDOWED else each for each in found)
    return found


PATTERNS = {
    "cohere2": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3_text": 6,
    "gpt_oss": 2,
    "olmo3": 4,
}
"""By model type, where a file says nothing: one layer in so many attends to everything."""


UNTURNED = ("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe")
"""Model types whose windowed layers alone turn queries and keys, if they have any."""


def _pattern(text: Any) -> int | None:
    """Older configurations have a number in the place of a word per layer, or nothing at all."""
    for name in ("sliding_window_pattern", "_sliding_window_pattern"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return PATTERNS.get(getattr(text, "model_type", ""))


def full_layers(text: Any, max_len: int | None = None) -> tuple[int, ...]:
    """Numbers of the layers that attend to everything, from 0; see `layer_types`."""
    types = layer_types(text, max_len)
    return tuple(number for number, kind in enumerate(types) if kind == FULL)

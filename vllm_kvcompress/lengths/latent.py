"""Models with multi-head latent attention (MLA): one latent vector per token for all heads.

A token's row in the cache is the latent c, `kv_lora_rank` numbers, followed by the rotated part of
its key, `qk_rope_head_dim` numbers. Keys and values of the heads are made of c by a projection
(``kv_b_proj``), so heads have no cache of their own. (DeepSeek-V2, arXiv 2405.04434, section 2.1)
"""

from typing import Any

SERVED = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2")
"""``model_type`` of families whose every layer is dense MLA, with one attention per layer.

Held against transformers by ``tests/e2e/test_latent_attention.py``; Kimi K2 has the class of V3.
"""

PLAIN_CACHES = ("auto", "float16", "bfloat16", "float32")
"""Values of ``--kv-cache-dtype`` with which rows are numbers as the model computes them."""


def latent_width(text: Any) -> int:
    """Numbers per token and layer of the cache, by the configuration of a language model."""
    return text.kv_lora_rank + text.qk_rope_head_dim


def unserved_latent(text: Any) -> str | None:
    """What stands in the way of a model with MLA; None if it is served.

    Parameters
    ----------
    text : object
        Hugging Face configuration of the text model; attributes that are missing say nothing.

    Returns
    -------
    str or None
        Words that follow the model's name.
    """
    if getattr(text, "index_topk", None) or getattr(text, "compress_ratios", None):
        return (
            "has sparse latent attention (MLA with an indexer), whose indexer has a cache of its "
            "own that holds every token"
        )
    kind = getattr(text, "model_type", None)
    if kind not in SERVED:
        return (
            f"has latent attention (MLA) of the kind {kind}, which has not been tried: served are "
            f"{', '.join(SERVED)}"
        )
    return None

"""Attention of transformers' models: what a replay runs, and what compactions must know of it."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.kernels.formulas.softmax_terms import SoftmaxTerms
from vllm_kvcompress.lengths.layer_kinds import UNTURNED, layer_types
from vllm_kvcompress.lengths.layer_words import FULL, WINDOWED


def softmax_terms(attention: Any) -> SoftmaxTerms:
    """Soft cap and learned sinks of a model's attention module."""
    return SoftmaxTerms(
        soft_cap=float(getattr(attention, "attn_logit_softcapping", None) or 0.0),
        sinks=getattr(attention, "sinks", None),
    )


def attention_and_mask(attention: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What computes a module's attention, and what makes the masks for that.

    Torch's own attention knows no soft caps and no sinks, and transformers' leaves them out there:
    modules that have them run their model's plain version.
    """
    terms = softmax_terms(attention)
    if terms.soft_cap or terms.sinks is not None:
        return _as_written, eager_mask
    return sdpa_attention_forward, sdpa_mask


def _as_written(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> Any:
    attend = sys.modules[type(module).__module__].eager_attention_forward
    if mask is not None and mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, hidden)
    elif query.shape[2] == 1:
        mask = None  # made for the first layer; others may hold different numbers of tokens
    return attend(module, query, key, value, mask, **kwargs)


def find_rotary(decoder: Any) -> Rotary | None:
    """The embedding of the layers that can be compacted; None where they have none.

    Other kinds of layers may have their own.
    """
    embedding, config = getattr(decoder, "rotary_emb", None), decoder.config
    if embedding is None:
        return None
    own = getattr(embedding, f"{FULL}_inv_freq", None)
    inv_freq = embedding.inv_freq if own is None else own
    if config.model_type in UNTURNED and WINDOWED in layer_types(config):
        inv_freq = torch.zeros_like(inv_freq)
    return Rotary(inv_freq, is_neox=True)

"""One attention layer, as far as compaction is concerned."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.worker.layout import CacheLayout


@dataclass(frozen=True)
class LayerCache:
    """One attention layer and where its cache lies.

    Attributes
    ----------
    name : str
        vLLM's name of the layer.
    index : int
        Number of the layer in the model, from 0.
    group : int
        KV cache group.
    scale : float
        Softmax scale.
    layout : CacheLayout
        How its blocks are laid out.
    cache : callable
        Returns the layer's cache tensor (it is bound late and may be rebound).
    rotary : Rotary or None
        Its rotary embedding.
    output_projection : callable or None
        Returns [num_heads, hidden_size, head_dim].
    """

    name: str
    index: int
    group: int
    scale: float
    layout: CacheLayout
    cache: Callable[[], torch.Tensor]
    rotary: Rotary | None = None
    output_projection: Callable[[], torch.Tensor] | None = None

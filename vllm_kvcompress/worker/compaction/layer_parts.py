"""What lies around an attention layer in its model: rotary embedding and output projection."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding, RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding

from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.kernels.formulas.softmax_terms import SoftmaxTerms

# Angles are position * inv_freq and nothing else: no scaling of lengths, none of positions.
_PLAIN_ROTARY = (RotaryEmbedding, Llama3RotaryEmbedding)


TURNED_IF: dict[str, Callable[[Any], bool]] = {
    "AfmoeAttention": lambda layer: layer.is_local_attention,
    "CohereAttention": lambda layer: layer.v1 or layer.sliding_window is not None,
    "Cohere2MoeAttention": lambda layer: layer.sliding_window is not None or layer.force_rope,
    "Exaone4Attention": lambda layer: (
        layer.sliding_window is not None or layer.apply_rope_all_layers
    ),
    "ExaoneMoeAttention": lambda layer: layer.use_rope,
    "FalconAttention": lambda layer: layer.use_rotary,
    "GraniteAttention": lambda layer: layer.use_rope,
    "GraniteMoeAttention": lambda layer: layer.use_rope,
    "OlmoHybridAttention": lambda layer: layer._use_rope,
    "Step3p5Attention": lambda layer: layer.use_rope,
}
"""Layers that may have a rotary embedding beside them and leave it unused, by class of vLLM's."""


def _parent(model: nn.Module, layer_name: str) -> nn.Module:
    return model.get_submodule(layer_name.rpartition(".")[0])


def find_rotary(model: nn.Module, layer_name: str, device: torch.device) -> Rotary | None:
    """The rotary embedding beside an attention layer; None if there is no plain one.

    Of a layer that leaves its embedding unused, as layers of some models do that attend to
    everything, it turns nothing. M-RoPE is plain where all positions of a token are the same, that
    is for text.

    Parameters
    ----------
    model : nn.Module
        vLLM's model.
    layer_name : str
        vLLM's name of the attention layer, e.g. ``model.layers.0.self_attn.attn``.
    device : torch.device
        Where the frequencies go.
    """
    parent = _parent(model, layer_name)
    found = [module for module in parent.children() if isinstance(module, RotaryEmbeddingBase)]
    if len(found) != 1 or not _is_plain(found[0]):
        return None
    inv_freq = found[0]._compute_inv_freq(found[0].base)
    turns = TURNED_IF.get(type(parent).__name__)
    if turns is not None and not turns(parent):
        inv_freq = torch.zeros_like(inv_freq)
    return Rotary(inv_freq.to(device, torch.float32), found[0].is_neox_style)


def _is_plain(rotary: Any) -> bool:
    if type(rotary) is MRotaryEmbedding:
        return rotary.scaling_factor is None
    return type(rotary) in _PLAIN_ROTARY


def find_output_projection(
    model: nn.Module, layer_name: str, num_heads: int, head_dim: int
) -> Callable[[], torch.Tensor] | None:
    """A function that returns [num_heads, hidden_size, head_dim]; None if there is no projection.

    With LoRA it is the model's own, without an adapter: policies rank tokens by it, and rank them
    alike for all adapters. Where the weight is a plain matrix it is a view. Where it is packed or
    quantised (vLLM packs it on CPU), it is read back by projecting unit vectors, anew each time:
    nothing is kept.
    """
    children = [
        each.base_layer if isinstance(each, BaseLayerWithLoRA) else each
        for each in _parent(model, layer_name).children()
    ]
    found = [module for module in children if isinstance(module, RowParallelLinear)]
    if len(found) != 1 or found[0].input_size_per_partition != num_heads * head_dim:
        return None
    return lambda: _matrix(found[0]).unflatten(1, (num_heads, head_dim)).transpose(0, 1)


def _matrix(projection: Any) -> torch.Tensor:
    """[hidden_size, num_heads * head_dim] of this rank."""
    weight = getattr(projection, "weight", None)
    width = projection.input_size_per_partition
    if (
        weight is not None
        and weight.shape == (projection.output_size, width)
        and weight.is_floating_point()
        and weight.element_size() > 1
    ):
        return weight.detach()
    device = next((p.device for p in projection.parameters()), torch.device("cpu"))
    units = torch.eye(width, dtype=projection.params_dtype, device=device)
    return projection.quant_method.apply(projection, units, bias=None).T


def softmax_terms(impl: Any) -> SoftmaxTerms:
    """Soft cap and learned sinks of an attention layer, by its backend's implementation.

    Sinks are this rank's heads' alone: the models give each rank its share.
    """
    return SoftmaxTerms(
        soft_cap=float(getattr(impl, "logits_soft_cap", None) or 0.0),
        sinks=getattr(impl, "sinks", None),
    )

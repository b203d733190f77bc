"""What lies around an attention layer in its model: rotary embedding and output projection."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding, RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.model_executor.models.utils import extract_layer_index

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.host.attention_probe import ProbedLayer
from vllm_kvcompress.host.model_checks import has_plain_rotary
from vllm_kvcompress.host.part_checks import (
    Turning,
    has_output_projections,
    keys_turn,
    on_transformers_backend,
    probed_layers,
)
from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.kernels.formulas.softmax_terms import SoftmaxTerms
from vllm_kvcompress.worker.layout.layer_cache import LayerCache

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


def softmax_terms(impl: Any) -> SoftmaxTerms:
    """Soft cap and learned sinks of an attention layer, by its backend's implementation.

    Sinks are this rank's heads' alone: the models give each rank its share.
    """
    return SoftmaxTerms(
        soft_cap=float(getattr(impl, "logits_soft_cap", None) or 0.0),
        sinks=getattr(impl, "sinks", None),
    )


class LayerParts:
    """Finds what lies around attention layers.

    Parameters
    ----------
    model : nn.Module
        vLLM's model.
    model_config : ModelConfig
        vLLM's.
    device : torch.device
        Where frequencies go.
    """

    def __init__(self, model: nn.Module, model_config: Any, device: torch.device) -> None:
        self.model, self.model_config, self.device = model, model_config, device
        self.from_transformers = on_transformers_backend(model_config)
        # No head of latent attention has keys that turn, nor values that are cached.
        self.is_latent = getattr(model_config, "use_mla", False)

    def _around(self, layer_name: str) -> nn.Module:
        return self.model.get_submodule(layer_name.rpartition(".")[0])

    def _probed(self, layer_name: str) -> ProbedLayer:
        found = probed_layers(self.model_config)
        return found.get(extract_layer_index(layer_name), ProbedLayer())

    def rotary(self, layer_name: str) -> Rotary | None:
        """The rotary embedding of an attention layer; None if it is no plain one.

        A layer that turns nothing has frequencies of zero. M-RoPE is plain where all positions of a
        token are the same, that is for text. `layer_name` is vLLM's, e.g.
        ``model.layers.0.self_attn.attn``.
        """
        if self.is_latent or not has_plain_rotary(self.model_config):
            return None
        found = (
            self._probed(layer_name).rotary
            if self.from_transformers
            else self._rotary_beside(layer_name)
        )
        if found is None:
            return None
        return Rotary(found.inv_freq.to(self.device, torch.float32), found.is_neox)

    def _rotary_beside(self, layer_name: str) -> Rotary | None:
        around = self._around(layer_name)
        found = [each for each in around.children() if isinstance(each, RotaryEmbeddingBase)]
        if len(found) != 1 or not _is_plain(found[0]):
            return None
        inv_freq = found[0]._compute_inv_freq(found[0].base)
        turns = TURNED_IF.get(type(around).__name__)
        if turns is not None and not turns(around):
            inv_freq = torch.zeros_like(inv_freq)
        return Rotary(inv_freq, found[0].is_neox_style)

    def output_projection(
        self, layer_name: str, num_heads: int, head_dim: int
    ) -> Callable[[], torch.Tensor] | None:
        """A function that returns [num_heads, hidden_size, head_dim]; None if there is none.

        With LoRA it is the model's own, without an adapter: policies rank tokens by it, and rank
        them alike for all adapters. Where the weight is a plain matrix it is a view. Where it is
        packed or quantised (vLLM packs it on CPU), it is read back by projecting unit vectors, anew
        each time: nothing is kept.
        """
        if self.is_latent:
            return None
        around = self._around(layer_name)
        if self.from_transformers:
            name = self._probed(layer_name).output_projection
            children = [around.get_submodule(name)] if name else []
        else:
            children = list(around.children())
        children = [
            each.base_layer if isinstance(each, BaseLayerWithLoRA) else each for each in children
        ]
        found = [module for module in children if isinstance(module, RowParallelLinear)]
        if len(found) != 1 or found[0].input_size_per_partition != num_heads * head_dim:
            return None
        return lambda: _matrix(found[0]).unflatten(1, (num_heads, head_dim)).transpose(0, 1)


def _is_plain(rotary: Any) -> bool:
    if type(rotary) is MRotaryEmbedding:
        return rotary.scaling_factor is None
    return type(rotary) in _PLAIN_ROTARY


def check_parts(layers: Sequence[LayerCache], config: CompressionConfig, model_config: Any) -> None:
    """Refuse models around whose layers a policy would not find what it needs.

    A request may name any preset, and is refused on admission by what was known before the model
    was built: of that, everything must be there whatever the server's policy.

    Raises
    ------
    UnsupportedModelError
        Naming the layer.
    """
    policies = [each.build_policy() for each in (config, *config.by_task.values())]
    for layer in layers:
        for policy in policies:
            layer.require(policy)
    if getattr(model_config, "use_mla", False):
        return  # policies that read these parts are refused
    projects, turning = has_output_projections(model_config), keys_turn(model_config)
    first = layers[0].rotary if layers else None  # a pipeline stage may have none
    for layer in layers:
        lacks_rotary = turning is not Turning.UNKNOWN and layer.rotary is None
        # Layers of one group are turned together.
        is_other = turning is Turning.ALIKE and _turns(layer.rotary) != _turns(first)
        if lacks_rotary or is_other or (projects and layer.output_projection is None):
            raise UnsupportedModelError(
                f"--kv-compression: around layer {layer.name} there is no output projection or "
                "rotary embedding of a kind that is known: choose another model, or drop "
                "--kv-compression."
            )


def _turns(rotary: Rotary | None) -> bool:
    return rotary is not None and bool(rotary.inv_freq.any())


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

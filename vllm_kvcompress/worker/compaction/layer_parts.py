"""What lies around an attention layer in its model: rotary embedding and output projection."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding, RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding
from vllm.model_executor.models.utils import extract_layer_index

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.host.attention_probe import ProbedLayer
from vllm_kvcompress.host.part_checks import (
    Turning,
    has_output_projections,
    keys_turn,
    on_transformers_backend,
    probed_layers,
)
from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.worker.compaction.rotary_calls import calls_rotary
from vllm_kvcompress.worker.layout.layer_cache import LayerCache

# Angles are position * inv_freq and nothing else: no scaling of lengths, none of positions.
_PLAIN_ROTARY = (RotaryEmbedding, Llama3RotaryEmbedding)


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

    def _around(self, layer_name: str) -> nn.Module:
        return self.model.get_submodule(layer_name.rpartition(".")[0])

    def _probed(self, layer_name: str) -> ProbedLayer:
        found = probed_layers(self.model_config)
        return found.get(extract_layer_index(layer_name), ProbedLayer())

    def rotary(self, layer_name: str) -> Rotary | None:
        """The rotary embedding of an attention layer; None if it is no plain one.

        A layer that turns nothing has frequencies of zero. `layer_name` is vLLM's, e.g.
        ``model.layers.0.self_attn.attn``.
        """
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
        found = [
            (name, module)
            for name, module in around.named_children()
            if isinstance(module, RotaryEmbeddingBase)
        ]
        if len(found) != 1 or type(found[0][1]) not in _PLAIN_ROTARY:
            return None
        name, module = found[0]
        rotary = Rotary(module._compute_inv_freq(module.base), module.is_neox_style)
        if calls_rotary(around, name):
            return rotary
        probed = self._probed(layer_name)
        if probed.rotary is None:
            return None
        return rotary if probed.turns else probed.rotary

    def output_projection(
        self, layer_name: str, num_heads: int, head_dim: int
    ) -> Callable[[], torch.Tensor] | None:
        """A function that returns [num_heads, hidden_size, head_dim]; None if there is none.

        With LoRA it is the model's own, without an adapter: policies rank tokens by it, and rank
        them alike for all adapters. Where the weight is a plain matrix it is a view. Where it is
        packed or quantised (vLLM packs it on CPU), it is read back by projecting unit vectors, anew
        each time: nothing is kept.
        """
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
    projects = has_output_projections(model_config)
    for layer in layers:
        for policy in policies:
            layer.require(policy)
        turning = _turning(layer.rotary)
        lacks_rotary = turning < Turning.ALIKE and turning < keys_turn(model_config)
        if lacks_rotary or (projects and layer.output_projection is None):
            raise UnsupportedModelError(
                f"--kv-compression: around layer {layer.name} there is no output projection or "
                "rotary embedding of a kind that is known: choose another model, or drop "
                "--kv-compression."
            )


def _turning(rotary: Rotary | None) -> Turning:
    if rotary is None:
        return Turning.UNKNOWN
    return Turning.ALIKE if rotary.inv_freq.any() else Turning.PARTLY


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

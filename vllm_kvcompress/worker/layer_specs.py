"""Which of a model's attention layers are compacted, and the cache specs that say so to vLLM."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from vllm_kvcompress.config.settings import LayerGroupsConfig
from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.lengths.budgets import layer_groups
from vllm_kvcompress.lengths.layer_kinds import full_layers
from vllm_kvcompress.spec import CompressedAttentionSpec, CompressedMLASpec


class CompactedLayers:
    """The target's layers that attend to everything. All others are left to vLLM.

    Layer groups, budgets and shared rankings count these layers only.

    Parameters
    ----------
    vllm_config : VllmConfig
        vLLM's; its layers exist once the model is loaded.

    Attributes
    ----------
    places : dict[int, int]
        Of each layer, by its number in the model, the place among them.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config, model = vllm_config, vllm_config.model_config
        self.max_len = model.max_model_len
        numbers = full_layers(model.hf_text_config, self.max_len)
        self.places = {number: place for place, number in enumerate(numbers)}

    def __len__(self) -> int:
        return len(self.places)

    def place(self, name: str) -> int:
        """Place of the layer that vLLM calls `name`."""
        return self.places[extract_layer_index(name)]

    def by_name(self) -> dict[str, Attention | MLAAttention]:
        """The layers, by vLLM's names.

        Raises
        ------
        UnsupportedModelError
            If two are of one number: one of them belongs to another part than the language model.
        """
        base: Any = AttentionLayerBase
        layers = get_layers_from_vllm_config(self.vllm_config, base)
        found: dict[int, str] = {}
        for name, layer in layers.items():
            if not isinstance(layer, Attention | MLAAttention) or layer.is_draft_layer:
                continue
            number = extract_layer_index(name)
            if number not in self.places:
                continue
            if number in found:
                raise UnsupportedModelError(
                    f"--kv-compression: {found[number]} and {name} are both layer {number}, and "
                    "only one language model per server can be compacted: choose another model, "
                    "or drop --kv-compression."
                )
            found[number] = name
        return {name: layers[name] for name in found.values()}

    def specs(
        self, host_specs: Mapping[str, KVCacheSpec], config: LayerGroupsConfig
    ) -> dict[str, KVCacheSpec]:
        """Specs of all layers: of those that are compacted with the number of their layer group.

        A draft model's layers have the spec and no number. Windowed layers and those with a
        recurrent state keep vLLM's own.

        Raises
        ------
        UnsupportedModelError
            If a layer is of another kind than the model's configuration says.
        """
        groups = layer_groups(len(self), config)
        num_groups = max(groups) + 1
        layers = self.vllm_config.compilation_config.static_forward_context
        found: dict[str, KVCacheSpec] = {}
        for name, spec in host_specs.items():
            is_other = getattr(layers[name], "is_draft_layer", False)
            place = None if is_other else self.places.get(extract_layer_index(name))
            whole = self._attending_to_all(spec)
            if whole is not None and (place is not None or is_other):
                number = None if place is None else groups[place]
                latent = isinstance(whole, MLAAttentionSpec)
                ours = CompressedMLASpec if latent else CompressedAttentionSpec
                found[name] = ours.from_full(whole, number, num_groups)
            elif not is_other and self._is_left_to_vllm(name, host_specs):
                found[name] = spec
            else:
                raise UnsupportedModelError(
                    f"--kv-compression: {name} has a {type(spec).__name__}, which does not go with "
                    "what the model's configuration says of its layers: choose another model, or "
                    "drop --kv-compression."
                )
        return found

    def _is_left_to_vllm(self, name: str, host_specs: Mapping[str, KVCacheSpec]) -> bool:
        """Whether a layer that cannot be compacted is none that should attend to everything.

        A recurrent state may lie beside such a layer's attention.
        """
        number, kind = extract_layer_index(name), type(host_specs[name])
        if number not in self.places:
            is_hybrid = self.vllm_config.model_config.is_hybrid
            return kind is SlidingWindowSpec or (kind is MambaSpec and is_hybrid)
        return kind is MambaSpec and any(
            self._attending_to_all(spec) is not None and extract_layer_index(other) == number
            for other, spec in host_specs.items()
        )

    def _attending_to_all(self, spec: KVCacheSpec) -> FullAttentionSpec | None:
        """The spec of a layer that attends to everything; None for another layer's.

        A window that no sequence outgrows is none.
        """
        window = getattr(spec, "sliding_window", None)  # of all kinds below
        if type(spec) in (FullAttentionSpec, MLAAttentionSpec) and window is None:
            return spec
        if type(spec) is SlidingWindowSpec and window is not None and window >= self.max_len:
            shared = {each.name for each in fields(FullAttentionSpec)} - {"sliding_window"}
            own = {each.name: getattr(spec, each.name) for each in fields(spec)}
            return FullAttentionSpec(**{k: v for k, v in own.items() if k in shared})
        return None

"""KV cache spec that carries a layer group's number.

Layers with different numbers refuse to merge, so vLLM's hybrid allocator gives every layer group
its own block table over the one shared pool.

Of the spec vLLM asks how much memory the longest request takes, and starts where that fits: less
than all of it where the server's setting compresses inside prompts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    iter_layer_specs,
)

from vllm_kvcompress.config.reading import server_setting
from vllm_kvcompress.kernels.codebook.format import codes_per_row
from vllm_kvcompress.lengths.longest_peak import longest_prompt_peak


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionSpec(FullAttentionSpec):
    """Full attention whose cache may be compacted.

    Attributes
    ----------
    layer_group : int or None
        Number of the layer group, from 0. None for layers that are never compacted, those of a
        draft model: they have blocks of their own.
    num_layer_groups : int
        Layer groups of the model.
    """

    layer_group: int | None = 0
    num_layer_groups: int = 1

    @classmethod
    def from_full(
        cls, spec: FullAttentionSpec, layer_group: int | None, num_layer_groups: int = 1
    ) -> "CompressedAttentionSpec":
        """Copy every field of a plain full-attention spec."""
        values = {f.name: getattr(spec, f.name) for f in fields(spec)}
        return cls(**values, layer_group=layer_group, num_layer_groups=num_layer_groups)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes that the longest prompt takes, of this layer, at most.

        What comes behind a prompt may take more: requests end where the pool does
        (core/longest.py).
        """
        whole = super().max_memory_usage_bytes(vllm_config)
        setting = server_setting(vllm_config.additional_config)
        if setting is None or self.layer_group is None:
            return whole
        max_len = vllm_config.model_config.max_model_len
        peaks = longest_prompt_peak(max_len, setting, self.num_layer_groups, self.block_size)
        num_ahead = vllm_config.num_speculative_tokens
        num_blocks = -(-(peaks[self.layer_group] + num_ahead) // self.block_size)
        return min(whole, num_blocks * self.page_size_bytes)

    @classmethod
    def merge(cls, specs: list["CompressedAttentionSpec"]) -> "CompressedAttentionSpec":  # type: ignore[override]
        """Merge specs of one layer group; specs of different groups raise AssertionError."""
        _check_one_group(specs)
        merged = super().merge(specs)
        return _numbered_as(specs[0], merged)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all layers belong to this spec's layer group."""
        return all(
            isinstance(spec, CompressedAttentionSpec) and spec.layer_group == self.layer_group
            for spec in kv_cache_specs.values()
        )


@dataclass(frozen=True, kw_only=True)
class CompressedMLASpec(MLAAttentionSpec, CompressedAttentionSpec):
    """The same for latent attention (MLA): one vector per token, and no values.

    vLLM's class comes first: its defaults and its padding count.
    """

    @classmethod
    def merge(cls, specs: list["CompressedMLASpec"]) -> "CompressedMLASpec":  # type: ignore[override]
        """Merge specs of one layer group; specs of different groups raise AssertionError."""
        _check_one_group(specs)
        merged = super().merge(specs)
        return _numbered_as(specs[0], merged)


def _numbered_as(first: CompressedAttentionSpec, merged: Any) -> Any:
    """vLLM's merge takes none of our fields along."""
    ours = {"layer_group": first.layer_group, "num_layer_groups": first.num_layer_groups}
    return replace(merged, **ours)


def _check_one_group(specs: Iterable[KVCacheSpec]) -> None:
    groups = {getattr(spec, "layer_group", "without number") for spec in specs}
    if len(groups) != 1:
        raise AssertionError(f"Layers of layer groups {sorted(map(str, groups))} do not merge.")


@dataclass(frozen=True)
class GroupMap:
    """How vLLM's KV cache groups and our layer groups belong together.

    Attributes
    ----------
    layer_groups : tuple[int or None, ...]
        Layer group of every KV cache group; None for one that is never compacted: of a draft
        model, or of layers that vLLM serves as ever because they attend to a window.
    num_layer_groups : int
        Layer groups that are compacted.
    block_size : int
        Their tokens per block. A draft model's may be another.
    codes_per_row : int
        Tokens whose codes one of their slots takes.
    """

    layer_groups: tuple[int | None, ...]
    num_layer_groups: int
    block_size: int
    codes_per_row: int

    @classmethod
    def of(cls, specs: Iterable[KVCacheSpec]) -> "GroupMap":
        """Read the specs of all KV cache groups, in order."""
        # Where pages differ in size, vLLM may wrap a group's specs into one.
        layers = [next(iter(iter_layer_specs(spec))) for spec in specs]
        numbers = tuple(getattr(layer, "layer_group", None) for layer in layers)
        compacted = [
            layer
            for layer in layers
            if isinstance(layer, CompressedAttentionSpec) and layer.layer_group is not None
        ]
        sizes = {layer.block_size for layer in compacted}
        assert len(sizes) == 1, f"layer groups with blocks of {sorted(sizes)} tokens"
        codes = {codes_per_row(each.head_size * each.dtype.itemsize) for each in compacted}
        assert len(codes) == 1, "layers of one model whose caches have rows of different lengths"
        count = max(number for number in numbers if number is not None) + 1
        return cls(numbers, count, sizes.pop(), codes.pop())

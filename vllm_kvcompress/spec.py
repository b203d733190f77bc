"""KV cache spec that carries a layer group's number.

Layers with different numbers refuse to merge, so vLLM's hybrid allocator gives every layer group
its own block table over the one shared pool.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    iter_layer_specs,
)

from vllm_kvcompress.kernels.codebook.format import codes_per_row


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionSpec(FullAttentionSpec):
    """Full attention whose cache may be compacted.

    Attributes
    ----------
    layer_group : int or None
        Number of the layer group, from 0. None for layers that are never compacted, those of a
        draft model: they have blocks of their own.
    """

    layer_group: int | None = 0

    @classmethod
    def from_full(
        cls, spec: FullAttentionSpec, layer_group: int | None
    ) -> "CompressedAttentionSpec":
        """Copy every field of a plain full-attention spec."""
        values = {f.name: getattr(spec, f.name) for f in fields(spec)}
        return cls(**values, layer_group=layer_group)

    @classmethod
    def merge(cls, specs: list["CompressedAttentionSpec"]) -> "CompressedAttentionSpec":  # type: ignore[override]
        """Merge specs of one layer group; specs of different groups raise AssertionError."""
        _check_one_group(specs)
        merged = super().merge(specs)
        return replace(merged, layer_group=specs[0].layer_group)

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
        return replace(merged, layer_group=specs[0].layer_group)


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

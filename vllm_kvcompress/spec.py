"""KV cache spec that carries a layer group's number.

Layers with different numbers refuse to merge, so vLLM's hybrid allocator gives every layer group
its own block table over the one shared pool.
"""

from dataclasses import dataclass, fields, replace

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionSpec(FullAttentionSpec):
    """Full attention whose cache may be compacted.

    Attributes
    ----------
    layer_group : int
        Number of the layer group, from 0.
    """

    layer_group: int = 0

    @classmethod
    def from_full(cls, spec: FullAttentionSpec, layer_group: int) -> "CompressedAttentionSpec":
        """Copy every field of a plain full-attention spec."""
        values = {f.name: getattr(spec, f.name) for f in fields(spec)}
        return cls(**values, layer_group=layer_group)

    @classmethod
    def merge(cls, specs: list["CompressedAttentionSpec"]) -> "CompressedAttentionSpec":  # type: ignore[override]
        """Merge specs of one layer group; specs of different groups raise AssertionError."""
        groups = {getattr(spec, "layer_group", None) for spec in specs}
        if len(groups) != 1:
            raise AssertionError(f"Layers of layer groups {sorted(map(str, groups))} do not merge.")
        merged = super().merge(specs)
        return replace(merged, layer_group=specs[0].layer_group)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all layers belong to this spec's layer group."""
        return all(
            isinstance(spec, CompressedAttentionSpec) and spec.layer_group == self.layer_group
            for spec in kv_cache_specs.values()
        )

"""Attention metadata of many layer groups from one build.

vLLM builds metadata once per KV cache group, and a step may have one per layer. Of two groups whose
layers are alike only four things differ: lengths, their bound, block table and slots. Where the
metadata of a backend holds nothing else that depends on them, that of further groups is the first
one's with these four replaced; a build, with its Python and its checks, is made once per step.
"""

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch

Chosen = tuple[int, ...] | frozenset[int]
"""Numbers of some KV cache groups."""

_LIKE_THE_FIRST: Mapping[str, frozenset[str]] = {
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadata": frozenset(
        {
            "num_actual_tokens", "max_query_len", "query_start_loc", "causal", "max_num_splits",
            "mm_prefix_query_range_tensor", "rswa_prefix_lens", "rswa_window",
            "rswa_window_tensor",
        }
    ),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadata": frozenset(
        {
            "num_actual_tokens", "max_query_len", "query_start_loc", "causal",
            "seq_threshold_3D", "num_par_softmax_segments", "softmax_segm_output",
            "softmax_segm_max", "softmax_segm_expsum", "mm_prefix_range",
            "mm_prefix_range_tensor", "rswa_prefix_lens", "rswa_window",
        }
    ),
}  # fmt: skip
"""Metadata that can be derived, and its fields that are of the batch or of scratch memory. All
others but `_OWN` must be None or 0, unused: schedules made from lengths, context parallelism.
`tests/worker/test_group_metadata.py` holds the sets, and what is derived, against vLLM's own."""

_OWN = frozenset({"seq_lens", "max_seq_len", "block_table", "slot_mapping"})


def derives(metadata: Any) -> bool:
    """Whether another group's metadata is this one with its own lengths, blocks and slots."""
    kind: Any = type(metadata)
    shared = _LIKE_THE_FIRST.get(f"{kind.__module__}:{kind.__qualname__}")
    if shared is None:
        return False
    values = [vars(metadata)[name] for name in _unused(kind, shared)]
    return all(each is None or (isinstance(each, int) and each == 0) for each in values)


@functools.cache
def _unused(kind: Any, shared: frozenset[str]) -> tuple[str, ...]:
    """Fields of metadata that depend on a group in ways that are not copied."""
    return tuple(each.name for each in fields(kind) if each.name not in shared | _OWN)


def _traits(attn_groups: Sequence[Any]) -> Any:
    """What decides a group's metadata beside lengths, blocks and slots; None if it is special."""
    if len(attn_groups) != 1 or attn_groups[0].kernel_block_size is not None:
        return None
    group, builder = attn_groups[0], attn_groups[0].get_metadata_builder()
    spec = group.kv_cache_spec
    if not is_dataclass(spec):
        return None
    return (
        group.backend,
        type(builder),
        type(spec),
        {f.name: getattr(spec, f.name) for f in fields(spec) if f.name != "layer_group"},
        {k: v for k, v in vars(builder).items() if isinstance(v, bool | int | float | str)},
    )


class _Views:
    """Rows of tensors as views. Making one takes as long as all else that a group needs."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}

    def of(self, tensor: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
        """Of each row of `tensor` the first `width` numbers.

        Tensors are told apart by address: those of a runner lie at one for good.
        """
        key = (tensor.data_ptr(), width)
        found = self._made.get(key)
        if found is None:
            if len(self._made) >= _MAX_VIEWS:
                self._made.clear()
            found = self._made[key] = tensor[:, :width].unbind()
        return found


_MAX_VIEWS = 64
"""Tensors and widths whose views are kept."""


class _Objects:
    """Metadata of further groups, by layer: the same objects for many steps.

    Making one takes several times as long as filling it, so they serve again as soon as nobody
    holds any of them. That is seen by their reference counts, which are compared with what they
    were when nobody did: whoever keeps a step's metadata, keeps it as it is. In between they are
    read only, as backends whose metadata `derives` do; a field is written when it changes.

    Parameters
    ----------
    kind : type
        Of the metadata.
    groups, layers : sequences
        Numbers of the groups, and the names of each one's layers.

    Attributes
    ----------
    by_layer : dict[str, object]
        To be copied: what is given away must not be this one.
    """

    def __init__(
        self, kind: type[Any], groups: Sequence[int], layers: Sequence[Sequence[str]]
    ) -> None:
        self._made = [object.__new__(kind) for _ in groups]
        self.by_layer = {
            name: made for made, names in zip(self._made, layers, strict=True) for name in names
        }
        self._fields = [(n, vars(made)) for n, made in zip(groups, self._made, strict=True)]
        self._kind = kind
        self._shared, self._own = dict[str, Any](), dict[str, Sequence[Any]]()
        self._unheld = self._counts()

    def _counts(self) -> list[int]:
        return list(map(sys.getrefcount, self._made))

    def serve(self, kind: type[Any]) -> bool:
        """Whether they are of this kind, and nobody holds one."""
        return self._kind is kind and self._counts() == self._unheld

    def fill(self, first: Mapping[str, Any], own: Mapping[str, Sequence[Any]]) -> None:
        """Let them have the first group's fields, but those of `own`, which are by group."""
        had = self._shared
        for name, value in first.items():
            if had.get(name, had) is not value and name not in own:
                had[name] = value
                for _, each in self._fields:
                    each[name] = value
        for name, values in own.items():
            # The same list may have other numbers in it by now; a tuple has not.
            if self._own.get(name) is not values or not isinstance(values, tuple):
                for group, each in self._fields:
                    each[name] = values[group]
        self._own = dict(own)


@dataclass(frozen=True)
class Families:
    """KV cache groups of a runner: those like the first, the rest, and those that stay whole.

    Attributes
    ----------
    first : int or None
        The first group that has layers and may be compacted; None where there is none: among the
        layers of a drafter, or on a pipeline stage without such layers.
    alike : tuple[int, ...]
        Further groups whose layers differ from the first's in their layer group alone.
    rest : tuple[int, ...]
        All other groups that have layers and may be compacted.
    alike_layers : tuple of sequences of str
        The layers of each group of `alike`.
    whole : frozenset[int]
        Groups that are never compacted: of a draft model, or of windowed layers.
    """

    first: int | None
    alike: tuple[int, ...]
    rest: tuple[int, ...]
    alike_layers: tuple[Sequence[str], ...] = ()
    whole: frozenset[int] = frozenset()
    _views: _Views = field(default_factory=_Views, repr=False, compare=False)
    _parts: dict[Chosen, list[Any]] = field(default_factory=dict, repr=False, compare=False)
    _objects: list[_Objects] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(
        cls, attn_groups: Sequence[Sequence[Any]], whole: frozenset[int] = frozenset()
    ) -> "Families":
        """Compare backends, specs and builders of all groups but `whole`."""
        compacted = [
            number for number, groups in enumerate(attn_groups) if groups and number not in whole
        ]
        if not compacted:
            return cls(None, (), (), (), whole)
        first, *others = compacted
        traits = _traits(attn_groups[first])
        alike = tuple(
            each for each in others if traits is not None and _traits(attn_groups[each]) == traits
        )
        layers = tuple(attn_groups[each][0].layer_names for each in alike)
        rest = tuple(each for each in others if each not in alike)
        return cls(first, alike, rest, layers, whole)

    @property
    def is_one(self) -> bool:
        """Whether there is one group, and it may be compacted."""
        return self.first is not None and not (self.alike or self.rest or self.whole)

    def part(self, attn_groups: Sequence[Sequence[Any]], chosen: Chosen) -> list[Any]:
        """`attn_groups`, always the same, with the layers of some groups alone."""
        found = self._parts.get(chosen)
        if found is None:
            found = [each if n in chosen else [] for n, each in enumerate(attn_groups)]
            self._parts[chosen] = found
        return found

    def derive(
        self,
        metadata: Any,
        seq_lens: torch.Tensor,
        max_seq_lens: Sequence[int],
        block_tables: Sequence[torch.Tensor],
        slot_mappings: torch.Tensor,
    ) -> dict[str, Any]:
        """Metadata of the groups that are like the first, by layer.

        Parameters
        ----------
        metadata : object
            Of the first group; `derives` is true of it.
        seq_lens : torch.Tensor
            [G, >= rows] int32 on the device: tokens that each row attends to, by group.
        max_seq_lens : sequence of int
            G bounds of them.
        block_tables : sequence of torch.Tensor
            G tables [rows, blocks] int32.
        slot_mappings : torch.Tensor
            [G, tokens] int64.
        """
        lengths = self._views.of(seq_lens, len(metadata.seq_lens))
        slots = self._views.of(slot_mappings, slot_mappings.shape[1])
        objects = self._objects_of(type(metadata))
        own = {
            "seq_lens": lengths, "max_seq_len": max_seq_lens, "block_table": block_tables,
            "slot_mapping": slots,
        }  # fmt: skip
        objects.fill(metadata.__dict__, own)
        return objects.by_layer.copy()

    def _objects_of(self, kind: type[Any]) -> _Objects:
        """Metadata that nobody holds."""
        if not (self._objects and self._objects[0].serve(kind)):
            self._objects[:] = [_Objects(kind, self.alike, self.alike_layers)]
        return self._objects[0]


def without_schedule(attn_groups: Sequence[Sequence[Any]]) -> None:
    """Let FlashAttention 3 schedule in its kernels, as vLLM does where windows differ by layer.

    With a schedule per group, every step would launch a kernel, a copy and a fill for each.
    """
    for builder in (
        builder
        for groups in attn_groups
        for group in groups
        for builder in group.metadata_builders
        if getattr(builder, "aot_schedule", False)
    ):
        builder.aot_schedule = False

"""Which groups are alike, and which of a backend's fields depend on a group."""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_kvcompress.spec import CompressedAttentionSpec
from vllm_kvcompress.worker.group_metadata import (
    _LIKE_THE_FIRST,
    _OWN,
    Families,
    without_schedule,
)

AT_DEFAULT = {
    "FlashAttentionMetadata": {
        "max_dcp_context_kv_len", "dcp_context_kv_lens", "num_decode_reqs", "num_prefill_reqs",
        "num_decode_tokens", "num_prefill_tokens", "scheduler_metadata",
    },
    "TritonAttentionMetadata": {"scheduler_metadata"},
}  # fmt: skip
"""Fields that are made from lengths: metadata that has them is not copied."""


@pytest.mark.parametrize("name", _LIKE_THE_FIRST)
def test_every_field_of_the_hosts_metadata_is_accounted_for(name: str) -> None:
    """A field that a new vLLM adds fails here, before it is copied from one group to another."""
    module, kind = name.split(":")
    metadata = resolve_obj_by_qualname(f"{module}.{kind}")
    shared = _LIKE_THE_FIRST[name]
    assert {each.name for each in fields(metadata)} == shared | _OWN | AT_DEFAULT[kind]
    assert not shared & _OWN and not (shared | _OWN) & AT_DEFAULT[kind]


def group(layer_group: int | None, **changes: Any) -> Any:
    """One attention group with what decides its metadata."""
    spec = FullAttentionSpec(
        block_size=changes.pop("block_size", 16), num_kv_heads=2, head_size=8, dtype=torch.float32
    )
    values = {"num_heads_q": 4, "aot_schedule": True, **changes.pop("builder", {})}
    builder = SimpleNamespace(**values)
    return SimpleNamespace(
        backend=changes.pop("backend", "A"), kernel_block_size=changes.pop("kernel_block", None),
        kv_cache_spec=CompressedAttentionSpec.from_full(spec, layer_group),
        metadata_builders=[builder], layer_names=[f"layer.{layer_group}"],
        get_metadata_builder=lambda: builder,
    )  # fmt: skip


def test_groups_that_differ_in_their_number_alone_are_alike() -> None:
    found = Families.of([[group(0)], [], [group(1)], [group(2)]])
    assert (found.first, found.alike, found.rest) == (0, (2, 3), ())
    assert found.alike_layers == (["layer.1"], ["layer.2"])


@pytest.mark.parametrize(
    "other",
    [
        group(1, backend="B"),
        group(1, block_size=32),
        group(1, kernel_block=8),
        group(1, builder={"num_heads_q": 8}),
        group(1, builder={"more": True}),
    ],
)
def test_others_are_built_for_themselves(other: Any) -> None:
    found = Families.of([[group(0)], [other], [group(2)]])
    assert (found.first, found.alike, found.rest) == (0, (2,), (1,))
    assert Families.of([[group(0), group(0)], [group(1)]]) == Families(0, (), (1,))


def test_schedules_are_switched_off() -> None:
    groups = [[group(0)], [], [group(1, builder={"aot_schedule": False})]]
    without_schedule(groups)
    assert [g.metadata_builders[0].aot_schedule for each in groups for g in each] == [False] * 2
    without_schedule([[SimpleNamespace(metadata_builders=[SimpleNamespace()])]])

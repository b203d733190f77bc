"""Which groups are alike, and which of a backend's fields depend on a group."""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_kvcompress.spec import CompressedAttentionSpec
from vllm_kvcompress.worker.group_metadata import (
    _LIKE_THE_FIRST,
    _OWN,
    Families,
    derives,
    without_schedule,
)

QUERIES = torch.tensor([0, 1, 2], dtype=torch.int32)
LENGTHS = torch.tensor([[50, 60, 0], [40, 30, 0], [7, 8, 0]], dtype=torch.int32)
TABLES = [torch.full((2, 4), number, dtype=torch.int32) for number in range(3)]
SLOTS = torch.arange(6).view(3, 2)

UNUSED = {
    "FlashAttentionMetadata": {
        "max_dcp_context_kv_len", "dcp_context_kv_lens", "num_decode_reqs", "num_prefill_reqs",
        "num_decode_tokens", "num_prefill_tokens", "scheduler_metadata",
    },
    "TritonAttentionMetadata": {"scheduler_metadata"},
}  # fmt: skip
"""Fields that are made from lengths: metadata that uses them is not copied."""


@pytest.mark.parametrize("name", _LIKE_THE_FIRST)
def test_every_field_of_the_hosts_metadata_is_accounted_for(name: str) -> None:
    """A field that a new vLLM adds fails here, before it is copied from one group to another."""
    module, kind = name.split(":")
    metadata = resolve_obj_by_qualname(f"{module}.{kind}")
    shared = _LIKE_THE_FIRST[name]
    assert {each.name for each in fields(metadata)} == shared | _OWN | UNUSED[kind]
    assert not shared & _OWN and not (shared | _OWN) & UNUSED[kind]


def common(group: int) -> CommonAttentionMetadata:
    """Two decoding requests as one layer group has them."""
    return CommonAttentionMetadata(
        query_start_loc=QUERIES, query_start_loc_cpu=QUERIES, num_reqs=2, num_actual_tokens=2,
        max_query_len=1, seq_lens=LENGTHS[group, :2], max_seq_len=int(LENGTHS[group, :2].max()),
        block_table_tensor=TABLES[group], slot_mapping=SLOTS[group],
    )  # fmt: skip


def builder(kind: Any, **values: Any) -> Any:
    """A builder of vLLM without its device; its `build` is vLLM's own."""
    made = object.__new__(kind)
    vars(made).update(values)
    return made


BUILDERS = {
    "flash": builder(
        FlashAttentionMetadataBuilder, aot_schedule=False, aot_sliding_window=(-1, -1),
        use_full_cuda_graph=True, max_cudagraph_size=512, max_num_splits=32, dcp_world_size=1,
        rswa_window=None, mm_prefix_query_ranges_np=None,
    ),
    "triton": builder(
        TritonAttentionMetadataBuilder, seq_threshold_3D=8, num_par_softmax_segments=16,
        max_seqs_64_segments=0, softmax_segm_output=torch.zeros(1), rswa_window=None,
        softmax_segm_max=torch.zeros(1), softmax_segm_expsum=torch.zeros(1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_derived_is_what_vllm_builds(name: str) -> None:
    build = BUILDERS[name].build
    first = build(0, common(0))
    assert derives(first)
    families = Families(0, (1, 2), (), (["one"], ["two", "more"]))
    bounds = [int(each[:2].max()) for each in LENGTHS]
    derived = families.derive(first, LENGTHS, bounds, TABLES, SLOTS)
    assert list(derived) == ["one", "two", "more"]
    assert derived["two"] is derived["more"]
    for group, layer in ((1, "one"), (2, "two")):
        expected = build(0, common(group))
        for each in fields(expected):
            own, wanted = getattr(derived[layer], each.name), getattr(expected, each.name)
            if isinstance(wanted, torch.Tensor):
                assert own.data_ptr() == wanted.data_ptr() and own.shape == wanted.shape, each.name
            else:
                assert own == wanted, each.name


@pytest.mark.parametrize("name", BUILDERS)
def test_a_step_has_the_objects_of_one_that_nobody_holds(name: str) -> None:
    """And all that has changed since; what somebody holds stays as it was."""
    build = BUILDERS[name].build
    families = Families(0, (1, 2), (), (["one"], ["two", "more"]))

    def step(more: int) -> dict[str, Any]:
        batch = common(0)
        batch.query_start_loc = QUERIES + more
        batch.num_actual_tokens += more
        bounds = [60 + more, 40 + more, 8 + more]
        return families.derive(build(0, batch), LENGTHS, bounds, TABLES, SLOTS)

    def seen(entry: Any) -> tuple[int, int, list[int]]:
        return entry.num_actual_tokens, entry.max_seq_len, entry.query_start_loc.tolist()

    expected = [[(2 + n, bound + n, [n, 1 + n, 2 + n]) for bound in (40, 8)] for n in range(4)]
    numbers = set(map(id, step(0).values()))
    second = step(1)
    assert set(map(id, second.values())) == numbers, "made anew"
    held = second.pop("more")
    del second
    third = step(2)
    assert third["two"] is not held
    assert [seen(third["one"]), seen(third["two"])] == expected[2]
    assert seen(held) == expected[1][1], "somebody's metadata has changed"
    del held
    fourth = step(3)
    assert fourth["two"] is not third["two"] and fourth["one"] is not third["one"]
    assert [seen(third[each]) for each in ("one", "two")] == expected[2]
    assert [seen(fourth[each]) for each in ("one", "two")] == expected[3]


def test_metadata_of_another_kind_is_made_anew() -> None:
    """As when a runner's builders are replaced."""
    families = Families(0, (1,), (), (["one"],))
    for name in BUILDERS:
        first = BUILDERS[name].build(0, common(0))
        derived = families.derive(first, LENGTHS, [60, 40, 8], TABLES, SLOTS)
        assert type(derived["one"]) is type(first)
        assert vars(derived["one"]).keys() == vars(first).keys()
        del derived


def test_bounds_may_come_in_the_same_list() -> None:
    families, bounds = Families(0, (1,), (), (["one"],)), [60, 40, 8]
    build = next(iter(BUILDERS.values())).build
    for bound in (40, 41):
        bounds[1] = bound
        derived = families.derive(build(0, common(0)), LENGTHS, bounds, TABLES, SLOTS)
        assert derived["one"].max_seq_len == bound
        del derived


@pytest.mark.parametrize(
    "used", [{"scheduler_metadata": torch.zeros(1)}, {"max_dcp_context_kv_len": 7}]
)
def test_what_vllm_makes_from_lengths_is_not_copied(used: dict[str, Any]) -> None:
    metadata = BUILDERS["flash"].build(0, common(0))
    vars(metadata).update(used)
    assert not derives(metadata)


def group(layer_group: int | None, **changes: Any) -> Any:
    """One attention group with what decides its metadata."""
    spec = FullAttentionSpec(
        block_size=changes.pop("block_size", 16), num_kv_heads=2, head_size=8, dtype=torch.float32
    )
    values = {"num_heads_q": 4, "aot_schedule": True, **changes.pop("builder", {})}
    own = SimpleNamespace(**values)
    return SimpleNamespace(
        backend=changes.pop("backend", "A"), kernel_block_size=changes.pop("kernel_block", None),
        kv_cache_spec=CompressedAttentionSpec.from_full(spec, layer_group),
        metadata_builders=[own], layer_names=[f"layer.{layer_group}"],
        get_metadata_builder=lambda: own,
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


def test_a_drafters_groups_alone_are_a_family_of_none() -> None:
    """Of a speculator's own layers; a pipeline stage may have none that are compacted either."""
    found = Families.of([[], [], [group(None)]], frozenset({2}))
    assert found == Families(None, (), (), (), frozenset({2}))


def test_schedules_are_switched_off() -> None:
    groups = [[group(0)], [], [group(1, builder={"aot_schedule": False})]]
    without_schedule(groups)
    assert [g.metadata_builders[0].aot_schedule for each in groups for g in each] == [False] * 2
    without_schedule([[SimpleNamespace(metadata_builders=[SimpleNamespace()])]])

"""Survivors that overwrite blocks of their own region, in both layouts."""

from dataclasses import replace

import pytest
import torch

from tests.worker.compaction.test_compactor import (
    LENGTHS,
    WINDOW,
    World,
    packed_world,
    strided_world,
)
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.kernels.compaction import select_tokens
from vllm_kvcompress.plans import CompactionPlan
from vllm_kvcompress.worker.batch import CompactionJob

KEPT = {"a": [64, 96], "b": [32, 96], "c": [96, 64]}
SNAPKV = {"name": "snapkv"}
TURNED = {"name": "streaming_llm", "rerotate_keys": True}


def in_place(plan: CompactionPlan, names: str) -> CompactionPlan:
    """Of the requests in `names`, all destinations but the first are the region's last blocks."""
    groups = []
    for group in plan.groups:
        if group is not None and plan.request_id in names:
            count = len(group.destination_blocks) - 1
            own = group.source_blocks[-count:] if count else ()
            group = replace(
                group, destination_blocks=group.destination_blocks[:1] + own, in_place=True
            )
        groups.append(group)
    return replace(plan, groups=tuple(groups))


def compact(world: World, policy: dict, names: str, triton: bool) -> dict:
    config = parse_config(
        {"policy": policy, "budget": {"ratio": 0.5}, "observation_window": WINDOW}
    )
    assert config is not None
    plans = [in_place(world.plan(name, KEPT[name]), names) for name in LENGTHS]
    compactor = world.compactor(config)
    if triton:
        compactor.select_tokens = select_tokens.select_tokens
    compactor.run([CompactionJob(each, config, row) for row, each in enumerate(plans)])
    return world.survivors(plans)


@pytest.mark.parametrize("policy", [SNAPKV, TURNED], ids=["copied", "turned"])
@pytest.mark.parametrize("names", ["a", "abc"])
@pytest.mark.parametrize("layout", ["packed", "strided", "small kernel blocks"])
def test_the_same_rows_survive_wherever_they_go(layout: str, names: str, policy: dict) -> None:
    make = {
        "packed": packed_world,
        "strided": strided_world,
        "small kernel blocks": lambda: strided_world("LBNHC", 16),
    }[layout]
    expected = compact(make(), policy, "", layout != "packed")
    found = compact(make(), policy, names, layout != "packed")
    assert found.keys() == expected.keys() and len(found) == 10
    for place, rows in found.items():
        for one, other in zip(rows, expected[place], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, msg=str(place))


def test_a_move_that_does_not_copy_first_would_be_found_out() -> None:
    """The kernel that copies block by block, on the same plans."""
    world = strided_world()
    world.layout.move_in_place = world.layout.move  # type: ignore[method-assign]
    expected = compact(strided_world(), SNAPKV, "", True)
    found = compact(world, SNAPKV, "abc", True)
    same = [torch.equal(rows[0], expected[place][0]) for place, rows in found.items()]
    assert not all(same)

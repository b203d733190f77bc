"""Which layer scores for which, where layers share scores."""

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.config.settings import LayerGroupsConfig
from vllm_kvcompress.lengths.budgets import layer_groups, score_leaders


@pytest.mark.parametrize(
    ("groups", "size", "leaders"),
    [
        ([0, 0, 0, 0, 0], None, [0, 0, 0, 0, 0]),
        ([0, 0, 0, 0, 0], 2, [0, 0, 2, 2, 4]),
        ([0, 0, 0, 1, 1, 1, 1], None, [0, 0, 0, 3, 3, 3, 3]),
        ([0, 0, 0, 1, 1, 1, 1], 2, [0, 0, 2, 3, 3, 5, 5]),
        ([0, 0, 1, 1], 1, [0, 1, 2, 3]),
        ([0, 1, 2], 5, [0, 1, 2]),
    ],
)
def test_leaders(groups: list[int], size: int | None, leaders: list[int]) -> None:
    assert score_leaders(groups, size) == leaders


def test_a_leader_leads_itself_and_never_another_group() -> None:
    for count in (1, 3, 7):
        groups = layer_groups(30, LayerGroupsConfig(count=count))
        for size in (None, 1, 2, 4, 30):
            leaders = score_leaders(groups, size)
            assert all(leaders[leader] == leader for leader in leaders)
            assert all(
                groups[leader] == group for leader, group in zip(leaders, groups, strict=True)
            )


def test_the_flagship_ranks_per_layer_and_the_papers_numbers_per_group() -> None:
    assert parse_config("windowkv").build_policy().layers_per_ranking == 1
    for preset in ("windowkv_llama3", "windowkv_qwen2.5"):
        policy = parse_config(preset).build_policy()
        assert policy.shares_scores and policy.layers_per_ranking is None
        assert policy.granularity == policy.window_size
    assert parse_config("windowkv").build_policy().granularity == 1

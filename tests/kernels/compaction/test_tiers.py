"""Ranks and tiers against sorting in plain Python."""

import pytest
import torch

from tests.policies.helpers import select
from vllm_kvcompress.kernels.compaction.tiers import best_tokens, ranks, two_tiers


def scores(seed: int = 0, num_tokens: int = 63) -> torch.Tensor:
    """With ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 30, (3, num_tokens), generator=generator).float()


@pytest.mark.parametrize("num_tokens", [1, 2, 63])
def test_ranks_follow_a_stable_sort(num_tokens: int) -> None:
    given = scores(num_tokens=num_tokens)
    for row, found in zip(given.tolist(), ranks(given).tolist(), strict=True):
        order = sorted(range(num_tokens), key=lambda i: -row[i])
        assert [found[i] for i in order] == list(range(num_tokens - 1, -1, -1))


def test_ranks_select_what_scores_select() -> None:
    given, forced = scores(), torch.zeros(63, dtype=torch.bool)
    for num_keep in (1, 17, 63):
        expected = select(given, forced, num_keep)
        assert torch.equal(select(ranks(given), forced, num_keep), expected)


def test_ranks_of_an_expanded_row() -> None:
    row = scores()[:1]
    assert torch.equal(ranks(row.expand(3, -1)), ranks(row).expand(3, -1))


@pytest.mark.parametrize("count", [0, 1, 2, 20, 63])
def test_best_tokens_takes_forced_ones_first(count: int) -> None:
    given, forced = scores(), torch.zeros(63, dtype=torch.bool)
    forced[[10, 40]] = True
    marked = best_tokens(given, forced, count)
    assert marked.sum(dim=1).tolist() == [count] * 3
    assert marked[:, forced].sum(dim=1).tolist() == [min(count, 2)] * 3
    for row, mark in zip(given, marked, strict=True):
        if 2 < count < 63:
            assert row[mark & ~forced].min() >= row[~mark & ~forced].max()


def test_two_tiers_keep_both_orders() -> None:
    first, second = scores(1), scores(2)[:1]
    upper = scores(3) > 20
    found = two_tiers(upper, first, second)
    assert found.shape == (3, 63)
    assert found.dtype == torch.float32
    for head in range(3):
        mark = upper[head]
        assert found[head][mark].min() > found[head][~mark].max()
        for tier, by in ((mark, first[head]), (~mark, second[0])):
            order = found[head][tier].argsort(descending=True)
            expected = by[tier].argsort(descending=True, stable=True)
            assert torch.equal(order, expected)


def test_small_differences_survive_in_the_upper_tier() -> None:
    first = torch.tensor([[1e-12, 2e-12, 3e-12, 5.0]])
    upper = torch.tensor([[True, True, True, False]])
    assert two_tiers(upper, first, first).argsort(descending=True).tolist() == [[2, 1, 0, 3]]

"""Block table rows of views against loops, column by column."""

import torch

from vllm_kvcompress.plans import GroupCache, GroupLengths, GroupPlan
from vllm_kvcompress.worker.draft.views import DraftViews

BLOCK, ROWS, COLUMNS = 16, 5, 12


def plan(region_blocks: int, destination: tuple[int, ...]) -> GroupPlan:
    lengths = GroupLengths(region_blocks * BLOCK, len(destination) * BLOCK)
    return GroupPlan(lengths, GroupCache(region_blocks * BLOCK, ()), (), (), destination, ())


def make_views() -> DraftViews:
    tables = [
        torch.arange(100 * g, 100 * g + ROWS * COLUMNS, dtype=torch.int32).view(ROWS, COLUMNS)
        for g in range(2)
    ]
    return DraftViews(tables, [BLOCK, BLOCK])


def by_loops(views: DraftViews, group: int, row: int, region: int, destination) -> list[int]:
    own = views.block_tables[group][row].tolist()
    found = list(destination)
    for column in range(len(destination), COLUMNS):
        source = column + region - len(destination)
        found.append(own[min(source, COLUMNS - 1)])
    return found


def test_a_view_is_its_own_blocks_and_then_the_requests() -> None:
    views = make_views()
    views.add(3, [plan(6, (901, 902)), plan(4, (903, 904, 905))])
    views.add(1, [plan(8, (906,)), None])
    views.begin()
    rows = torch.tensor([3, 1])
    expected = [
        [by_loops(views, 0, 3, 6, (901, 902)), by_loops(views, 0, 1, 8, (906,))],
        [by_loops(views, 1, 3, 4, (903, 904, 905)), views.block_tables[1][1].tolist()],
    ]
    for group in range(2):
        assert views.table(group, rows).tolist() == expected[group]
        assert views.table(group, rows).dtype == torch.int32
    assert views.num_dropped(0, rows).tolist() == [4 * BLOCK, 7 * BLOCK]
    assert views.num_dropped_np(1, rows.numpy()).tolist() == [BLOCK, 0]


def test_the_tail_is_read_anew_in_every_step() -> None:
    """A request's own row grows while its view lives."""
    views = make_views()
    views.add(0, [plan(2, (7,)), None])
    views.begin()
    views.block_tables[0][0, 5] = 777
    assert views.table(0, torch.tensor([0]))[0, 4] == 777


def test_a_new_view_replaces_the_old_and_a_reset_row_has_none() -> None:
    views = make_views()
    views.add(2, [plan(6, (901, 902, 903)), None])
    views.add(2, [plan(8, (904,)), None])
    views.begin()
    assert views.table(0, torch.tensor([2]))[0].tolist() == by_loops(views, 0, 2, 8, (904,))
    assert views.exists.tolist() == [False, False, True, False, False]
    views.reset_row(2)
    assert not views.exists.any()


def test_a_view_over_a_row_that_lost_tokens_of_the_same_region() -> None:
    """Of 8 blocks the row keeps 3 and the view 1: the tail is at column 3 of the row, 1 here."""
    views = make_views()
    views.add(4, [plan(8, (50,)), plan(8, (51,))], evicted_with_it=[5 * BLOCK, 0])
    views.begin()
    own = views.block_tables[0][4].tolist()
    assert views.table(0, torch.tensor([4]))[0, :4].tolist() == [50, *own[3:6]]
    assert views.num_dropped(0, torch.tensor([4])).tolist() == [2 * BLOCK]
    assert views.num_dropped(1, torch.tensor([4])).tolist() == [7 * BLOCK]

"""Bytes of compressed prompts, settings of equal bytes, and what is counted of the answers."""

from typing import Any

import pytest
import torch

from lab.codebook.curve import (
    GRID,
    Cell,
    Method,
    Paired,
    Point,
    Shape,
    best_within,
    paired,
    paper_share,
    points,
    right_digits,
    used_share,
)
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.evaluation.replay import Replay

SHAPE = Shape(num_layers=4, num_kv_heads=2, head_dim=64, element_bytes=4, block_size=16)
BASE = {
    "preset": "spindlekv",
    "policy": {"name": "knorm"},
    "layer_budget": {"shape": "uniform"},
    "observation_window": 8,
    "budget": {"ratio": 0.1, "floor": 1},
}


def setting(**fields: Any) -> CompressionConfig:
    config = parse_config({**BASE, **fields})
    assert config is not None
    return config


def plain() -> CompressionConfig:
    return setting(codebook=None)


def coded(**fields: Any) -> CompressionConfig:
    return setting(codebook={"shallow": 0.5, "entries": 0.25}, **fields)


# --- bytes --------------------------------------------------------------------------------


def test_slots_of_an_eviction() -> None:
    # 100 of 1000 tokens: 8 lie behind the last full block, 92 become 6 blocks. 104 are 7 blocks.
    assert SHAPE.full_slots(1000) == 4 * 63 * 16
    assert SHAPE.kept_slots(1000, plain()) == 4 * 7 * 16
    assert SHAPE.kept_slots(1000, None) == SHAPE.full_slots(1000)
    assert SHAPE.slot_bytes == 2 * 2 * 64 * 4


def test_slots_of_books_count_entries_codes_and_tail() -> None:
    # Two layers of four code 92 tokens: 23 entries are 2 blocks, 3 rows of codes one block; with
    # the tail of 8 these are 4 blocks. The other two keep 7 blocks.
    assert SHAPE.kept_slots(1000, coded()) == (2 * 4 + 2 * 7) * 16
    everything = coded(budget={"ratio": 1.0, "floor": 1})
    # 992 coded tokens: 248 entries are 16 blocks, 31 rows of codes 2 blocks; and the tail.
    assert SHAPE.kept_slots(1000, everything) == (2 * 19 + 2 * 63) * 16


def test_codes_per_slot_depend_on_its_bytes() -> None:
    everything = coded(budget={"ratio": 1.0, "floor": 1})
    half = Shape(4, 2, 64, element_bytes=2, block_size=16)  # 16 tokens' codes per slot, not 32
    assert half.kept_slots(1000, everything) == SHAPE.kept_slots(1000, everything) + 2 * 2 * 16
    wide = Shape(4, 8, 128, element_bytes=2, block_size=16)
    assert wide.kept_slots(1000, everything) == SHAPE.kept_slots(1000, everything)


def test_short_prompts_keep_everything() -> None:
    assert SHAPE.share([400], plain()) == 1.0


def test_share_is_of_bytes_not_of_prompts() -> None:
    kept = [SHAPE.kept_slots(length, plain()) for length in (1000, 3000)]
    full = [SHAPE.full_slots(length) for length in (1000, 3000)]
    expected = (2 * kept[0] + kept[1]) / (2 * full[0] + full[1])
    assert SHAPE.share([1000, 3000, 1000], plain()) == pytest.approx(expected)


def test_sizes_are_those_of_the_replay(probe_model: str) -> None:
    replay = Replay(probe_model, SHAPE.block_size)
    prompt = replay.prefill(torch.randint(10, 4000, (605,), generator=_seeded()).tolist())
    config = setting(
        policy={"name": "spindlekv", "selection": "union", "kernel_size": 1},
        codebook={"shallow": 0.5, "entries": 0.25},
        layer_budget={"shape": "linear"},
        budget={"ratio": 0.3, "floor": 1},
    )
    found = replay.compress(prompt, config)
    lengths = SHAPE.lengths(605, config)
    assert [each is not None and each.book is not None for each in lengths] == [1, 1, 0, 0]
    for layer, each, entries in zip(found.cache.layers, lengths, found.num_entries, strict=True):
        assert each is not None
        assert layer.keys.shape[2] == each.num_survivors + 605 - each.region_len
        assert (entries is None) == (each.book is None)
        if each.book is not None and entries is not None:
            assert entries.shape == (2, 2) and entries.min() > 0
            assert entries.max() <= each.book.num_entries
    # What a book gives back has the lengths that 16 bits hold, the tail its own.
    count = lengths[0].num_survivors  # type: ignore[union-attr]
    norms = found.cache.layers[0].values[0].norm(dim=-1)
    off = (norms - norms.half().float()).abs() / norms
    assert off[:, :count].max() < 2e-6 < off[:, count:].max()
    assert replay.decode(prompt, found.cache, 3) == replay.generate(prompt, config, 3)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- settings of equal bytes --------------------------------------------------------------

METHODS = [
    Method("even", "snapkv"),
    Method("pyramid", "pyramidkv"),
    Method("task", "windowkv"),
    Method("coded", "spindlekv", {"codebook": {"shallow": 0.5, "entries": 0.25}}),
    Method("all coded", "spindlekv", {"codebook": {"shallow": 1.0, "entries": 0.9}}),
    Method("books", "spindlekv", {"codebook": {"shallow": 1.0}}, "entries"),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_points_are_the_largest_within_budgets(method: Method) -> None:
    lens, budgets = [598, 600, 600, 1797], [0.01, 0.25, 0.06, 0.12, 0.121, 0.6]
    steps = range(1, GRID + 1, 9)  # a sample: the search below must not miss a larger one
    shares = [SHAPE.share(lens, method.setting(step / GRID)) for step in steps]
    assert shares == sorted(shares), "the search relies on it"
    found = points(method, budgets, lens, SHAPE)
    assert found and [point.value for point in found] == sorted({p.value for p in found})
    for point in found:
        assert point.share <= point.budget
        assert point.share == SHAPE.share(lens, point.config)
        if point.value < 1:
            larger = method.setting(point.value + 1 / GRID)
            assert SHAPE.share(lens, larger) > point.budget
    assert 0.01 not in [point.budget for point in found], "protected tokens take more"


def test_a_budget_that_changes_nothing_is_left_out() -> None:
    found = points(METHODS[3], [0.9, 0.95], [600], SHAPE)
    assert [point.budget for point in found] == [0.9] and found[0].value == 1.0


def test_settings() -> None:
    first = METHODS[3].setting(0.2)
    assert (first.budget.ratio, first.budget.floor, first.layer_groups.size) == (0.2, 1, 1)
    books = METHODS[5].setting(0.3)
    assert books.codebook is not None and books.budget.ratio == 1.0
    assert (books.codebook.entries, books.codebook.shallow) == (0.3, 1.0)
    task = METHODS[2].setting(0.2)
    assert task.policy.params["window_score"] == "mean" and task.budget.ratio == 0.2


# --- the paper's ratio --------------------------------------------------------------------


def test_the_papers_ratio() -> None:
    books = [torch.tensor([[10, 20], [30, 40]]), torch.tensor([[32, 32], [32, 32]]), None, None]
    first = (92 + 8) / 1000 * (25 + 8) / 100 * (64 + 32 / 32 + 1) / 64
    second = 100 / 1000 * (32 + 8) / 100 * 66 / 64
    third = (96 + 8) / 1000
    expected = (first + second + 2 * third) / 4
    assert paper_share(SHAPE, 1000, coded(), books) == pytest.approx(expected)
    assert paper_share(SHAPE, 1000, None, books) == 1.0
    assert paper_share(SHAPE, 400, coded(), [None] * 4) == 1.0
    assert used_share(SHAPE, 1000, coded(), books) == pytest.approx((25 + 32) / 64)
    assert used_share(SHAPE, 1000, plain(), [None] * 4) is None
    assert used_share(SHAPE, 1000, None, [None] * 4) is None


# --- answers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [(" 1234567.", 7), ("1 2 3 4 5 6 8", 6), ("0123456", 0), ("", 0), (" 12", 2)],
)
def test_right_digits(text: str, count: int) -> None:
    assert right_digits(text, "1234567") == count


def cell(share: float, digits: tuple[int, ...], method: str = "one", length: int = 600) -> Cell:
    point = Point(share + 0.01, 0.5, share, None)
    return Cell(method, length, point, 1.0, 2.0, share, share, None, digits, 7)


def test_cells() -> None:
    found = cell(0.1, (7, 6, 0, 7))
    assert found.right == 2 and found.digit_share == pytest.approx(20 / 28)
    cells = [cell(0.05, ()), cell(0.11, ()), cell(0.13, ())]
    assert best_within(cells, 0.12) is cells[1]
    assert best_within(cells, 0.04) is None


def test_pairs_are_compared_prompt_by_prompt() -> None:
    one = [cell(0.1, (7, 7, 3)), cell(0.2, (7, 6, 1), length=1800)]
    other = [cell(0.2, (0, 7, 7), "other", 1800), cell(0.1, (7, 5, 2), "other")]
    assert paired(one, other) == Paired(first=2, second=2, total=6, digits=(31, 28))
    with pytest.raises(ValueError, match="one and other"):
        paired(one, other[:1])

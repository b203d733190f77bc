"""Codebooks in blocks: written, read, extended, on the GPU's layout by kernels and on the CPU's.

Where a book has room for every vector, what it stands for is exact: attention over it must be
attention over the prompt's own keys and values.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels.paged import DEVICE
from tests.worker.compaction.test_compactor import (
    BLOCK,
    DIM,
    HEADS,
    KV,
    LAYERS,
    LENGTHS,
    ROTARY,
    World,
    noise,
    rows_of,
    strided_world,
)
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.kernels.codebook import attention as codebook_attention
from vllm_kvcompress.kernels.codebook import build as codebook_build
from vllm_kvcompress.plans import (
    BookLengths,
    CompactionPlan,
    GroupCache,
    GroupLengths,
    GroupPlan,
    PlanKind,
)
from vllm_kvcompress.worker.batch import CompactionJob
from vllm_kvcompress.worker.codebook.reader import CodebookReader, CodedRows
from vllm_kvcompress.worker.codebook.warm_up import warm_up_books
from vllm_kvcompress.worker.codebook.writer import CodebookWriter
from vllm_kvcompress.worker.compaction.compactor import Compactor
from vllm_kvcompress.worker.compaction.warm_up import warm_up
from vllm_kvcompress.worker.layout.packed import VectorLayout

KEPT = {"a": 150, "b": 40, "c": 96}
SETTING = {
    "policy": {"name": "snapkv"},
    "budget": {"ratio": 0.5},
    "codebook": {"groups": [0]},
    "observation_window": 8,
}


@pytest.fixture(params=["strided", "packed"])
def world(request, monkeypatch) -> World:
    """Three prompts in the cache. The strided one has blocks of two of its view's, for kernels."""
    if request.param == "strided":
        monkeypatch.setattr(
            "vllm_kvcompress.kernels.codebook.coded_tokens.backend_of", lambda *_: codebook_build
        )
        return strided_world(kernel_block=BLOCK // 2)
    found = World(VectorLayout(DIM), [torch.zeros(96, KV, BLOCK, 2 * DIM) for _ in range(LAYERS)])
    found.fill()
    return found


def is_strided(world: World) -> bool:
    return not isinstance(world.layout, VectorLayout)


def book_plan(world: World, name: str, book: BookLengths) -> CompactionPlan:
    """Code so many tokens of a prompt's full blocks in group 0; group 1 stays."""
    length = LENGTHS[name]
    region = length // BLOCK * BLOCK
    split, source = region // BLOCK, tuple(world.blocks[name])
    targets = tuple(world.free.pop(0) for _ in range(book.num_slots // BLOCK))
    group = GroupPlan(
        GroupLengths(region, book.num_slots, book),
        GroupCache(length, ((0, 4),)),
        tuple((s, min(e, region)) for s, e in ((0, 4), (length - 8, length)) if s < region),
        source[:split],
        targets,
        source[split:],
    )
    return CompactionPlan(name, length, False, 7, (group, None))


def with_books(compactor: Compactor) -> Compactor:
    """The compactor, and a writer of codebooks for its plans of these kinds."""
    counts = torch.zeros(LAYERS, 3, 2, KV, dtype=torch.int32, device=DEVICE)
    CodebookWriter(counts, None).register(compactor)
    return compactor


def books_of(compactor: Compactor) -> CodebookWriter:
    """The writer that `with_books` has registered."""
    return compactor.writers[PlanKind.CODES].__self__


def write(world: World, entries: dict[str, int], setting=None):
    """The compactor after it has coded all three prompts, and their plans by name."""
    config = parse_config({**SETTING, **(setting or {})})
    compactor = with_books(world.compactor(config))
    plans = {}
    for name, count in KEPT.items():
        book = BookLengths(count, entries[name], BLOCK)
        plans[name] = book_plan(world, name, book)
    compactor.run([CompactionJob(plan, config, row) for row, plan in enumerate(plans.values())])
    return compactor, config, plans


def stored(world: World, compactor, layer: int, row: int, plan: CompactionPlan):
    """What a layer's blocks hold."""
    group = plan.groups[0]
    blocks = torch.tensor(group.destination_blocks, device=DEVICE)
    books = books_of(compactor)
    return books.slots.load(
        compactor.layers[layer], blocks, group.lengths.book, books.entry_counts[layer, row]
    )


ROOMY = {"a": 160, "b": 64, "c": 96}


def test_blocks_hold_the_survivors(world: World) -> None:
    compactor, _, plans = write(world, ROOMY)
    for row, (name, plan) in enumerate(plans.items()):
        for layer in (0, 1):
            keys, values, _ = rows_of(name, layer)
            coded = stored(world, compactor, layer, row, plan)
            region = plan.groups[0].lengths.region_len
            for head, places in enumerate(coded.positions.tolist()):
                assert places == sorted(set(places)) and len(places) == KEPT[name]
                assert places[:4] == [0, 1, 2, 3] and places[-1] < region
                for start, end in plan.groups[0].forced:
                    assert set(range(start, end)) <= set(places)
                found_keys, found_values = coded.read(ROTARY)
                torch.testing.assert_close(found_keys[head], keys[head, places], rtol=0, atol=5e-3)
                torch.testing.assert_close(
                    found_values[head], values[head, places], rtol=0, atol=5e-3
                )
            assert coded.num_entries.tolist() == [[KEPT[name]] * KV] * 2, "noise shares nothing"
    measures = books_of(compactor).take_measures().tolist()
    vectors = float(sum(KEPT.values()) * KV * 2)
    assert measures == [[vectors, vectors, 0.0, 0.0]] * 2
    assert books_of(compactor).take_measures() is None


def test_layouts_store_the_same_where_books_are_full(monkeypatch) -> None:
    tight = dict.fromkeys(KEPT, 32)
    packed = World(VectorLayout(DIM), [torch.zeros(96, KV, BLOCK, 2 * DIM) for _ in range(LAYERS)])
    packed.fill()
    expected, _, packed_plans = write(packed, tight)
    monkeypatch.setattr(
        "vllm_kvcompress.kernels.codebook.coded_tokens.backend_of", lambda *_: codebook_build
    )
    strided = strided_world()
    compactor, _, plans = write(strided, tight)
    for row, name in enumerate(plans):
        for layer in (0, 1):
            found = stored(strided, compactor, layer, row, plans[name])
            wanted = stored(packed, expected, layer, row, packed_plans[name])
            assert torch.equal(found.positions, wanted.positions)
            for kind in ("keys", "values"):
                mine, theirs = getattr(found, kind), getattr(wanted, kind)
                assert torch.equal(mine.index, theirs.index)
                torch.testing.assert_close(mine.read(), theirs.read(), rtol=1e-4, atol=1e-4)
    measures = books_of(compactor).take_measures()
    torch.testing.assert_close(measures, books_of(expected).take_measures(), rtol=1e-4, atol=1e-3)
    assert measures[0, 2] > 0, "books were full"


# --- reading ----------------------------------------------------------------------------------


def coded_rows(plans, queries: list[tuple[str, int, list[int]]]) -> CodedRows:
    """Rows of query tokens: a request's name, the tail's tokens, and the whole block table row."""
    width = max(len(blocks) for _, _, blocks in queries)

    def int32(rows) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int32, device=DEVICE)

    books = [plans[name].groups[0].lengths.book for name, _, _ in queries]
    padded = [[*blocks, *[0] * (width - len(blocks))] for _, _, blocks in queries]
    shifted = [
        [*row[book.num_entries // BLOCK :], *[0] * (book.num_entries // BLOCK)]
        for row, book in zip(padded, books, strict=True)
    ]
    return CodedRows(
        batch_rows=np.arange(len(queries)),
        tokens=torch.arange(len(queries), device=DEVICE),
        table=int32(padded),
        code_table=int32(shifted),
        num_entries=int32([book.num_entries for book in books]),
        num_coded=int32([book.num_tokens for book in books]),
        first_slot=int32([book.num_slots for book in books]),
        num_tail=int32([tail for _, tail, _ in queries]),
        max_entries=max(book.num_entries for book in books),
        max_coded=max(book.num_tokens for book in books),
        max_tail=max(tail for _, tail, _ in queries),
    )


def attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[H, D] float64 attention of one query over [KV, n, D]."""
    keys = keys.double().repeat_interleave(HEADS // KV, dim=0)
    values = values.double().repeat_interleave(HEADS // KV, dim=0)
    weights = ((keys @ query.double()[..., None])[..., 0] * DIM**-0.5).softmax(dim=1)
    return (weights[:, None] @ values)[:, 0]


class State:
    """Stands for the rows of a step."""

    def __init__(self, rows: dict[int, CodedRows]) -> None:
        self.rows = rows


def read(world: World, compactor, rows: CodedRows, query: torch.Tensor, layer: int):
    reader = CodebookReader(State({0: rows}), compactor.layers, torch.device(DEVICE))
    if is_strided(world):
        reader._attend = codebook_attention.codebook_attention
    output = torch.full_like(query, float("nan"))
    reader.attend(str(layer), query, output)
    return output


def test_attention_reads_entries_codes_and_tail(world: World) -> None:
    """Two query tokens of one request see tails of different lengths."""
    compactor, _, plans = write(world, ROOMY)
    rows_wanted, queries = [], []
    for name in ("a", "b", "a", "c"):
        group = plans[name].groups[0]
        tail = LENGTHS[name] - group.lengths.region_len
        tail -= 1 if len(queries) == 2 else 0
        queries.append((name, tail, list(group.block_row)))
        rows_wanted.append((name, tail))
    query = noise(4, HEADS, DIM, seed=99)
    for layer in (0, 1):
        found = read(world, compactor, coded_rows(plans, queries), query, layer)
        for place, (name, tail) in enumerate(rows_wanted):
            row = list(plans).index(name)
            keys, values, _ = rows_of(name, layer)
            region = plans[name].groups[0].lengths.region_len
            kept = stored(world, compactor, layer, row, plans[name]).positions
            index = kept[..., None].expand(-1, -1, DIM)
            keys = torch.cat([keys.gather(1, index), keys[:, region : region + tail]], dim=1)
            values = torch.cat([values.gather(1, index), values[:, region : region + tail]], dim=1)
            expected = attention(query[place], keys, values)
            torch.testing.assert_close(found[place].double(), expected, rtol=0, atol=3e-3)


def test_layers_without_codebooks_are_left_alone(world: World) -> None:
    compactor, _, plans = write(world, ROOMY)
    group = plans["a"].groups[0]
    rows = coded_rows(plans, [("a", 3, list(group.block_row))])
    assert read(world, compactor, rows, noise(1, HEADS, DIM, seed=1), 2).isnan().all(), "group 1"


def test_a_book_is_extended_by_the_blocks_behind_it(world: World) -> None:
    """Request b: 40 coded tokens, then 90 more that generation put behind them."""
    compactor, config, plans = write(world, ROOMY)
    books_of(compactor).take_measures()
    group, length = plans["b"].groups[0], LENGTHS["b"]
    old = group.lengths.book
    tail = length - group.lengths.region_len  # 1 token of the prompt
    position = length + 90
    blocks = [*group.tail_blocks, *(world.free.pop(0) for _ in range(2))]
    num_new = len(blocks) * BLOCK
    more = [noise(2, KV, num_new, DIM, seed=400 + layer) for layer in (0, 1)]
    for layer in (0, 1):
        keys, values = more[layer]
        prompt_keys, prompt_values, _ = rows_of("b", layer)
        keys[:, :tail] = prompt_keys[:, length - tail :]
        values[:, :tail] = prompt_values[:, length - tail :]
        where = torch.tensor(blocks, device=DEVICE)
        world.layout.write(world.caches[layer], where, keys, values)
    held = old.num_slots + tail + 90
    region = held // BLOCK * BLOCK
    book = BookLengths(old.num_tokens + region - old.num_slots, 128, BLOCK)
    source = [*group.destination_blocks, *blocks]
    plan = GroupPlan(
        GroupLengths(region, book.num_slots, book, old.num_tokens, old.num_slots),
        GroupCache(held, (), old),
        (),
        tuple(source[: region // BLOCK]),
        tuple(world.free.pop(0) for _ in range(book.num_slots // BLOCK)),
        tuple(source[region // BLOCK :]),
    )
    job = CompactionPlan("b", position, True, 7, (plan, None))
    compactor.run([CompactionJob(job, config, 1)])
    count = region - old.num_slots
    assert count == 64, "two full blocks"
    for layer in (0, 1):
        before = stored(world, compactor, layer, 1, plans["b"])
        coded = stored(world, compactor, layer, 1, replace(plans["b"], groups=(plan, None)))
        assert torch.equal(coded.positions[:, :40], before.positions)
        first = group.lengths.region_len
        assert coded.positions[:, 40:].tolist() == [list(range(first, first + count))] * KV
        found_keys, found_values = coded.read(ROTARY)
        keys, values = more[layer]
        torch.testing.assert_close(found_keys[:, 40:], keys[:, :count], rtol=0, atol=5e-3)
        torch.testing.assert_close(found_values[:, 40:], values[:, :count], rtol=0, atol=5e-3)
        wanted = before.read(ROTARY)[0]
        torch.testing.assert_close(found_keys[:, :40], wanted, rtol=0, atol=1e-3)
    vectors = float(count * KV * 2)
    assert books_of(compactor).take_measures().tolist() == [[vectors, vectors, 0.0, 0.0]] * 2


def test_layers_are_coded_alike_one_at_a_time_and_together(world: World, monkeypatch) -> None:
    together, _, plans = write(world, ROOMY)
    monkeypatch.setattr("vllm_kvcompress.worker.codebook.writer.MAX_COPY_BYTES", 1)
    monkeypatch.setattr("vllm_kvcompress.kernels.codebook.coded_tokens.MAX_GRAPH_BYTES", 1)
    apart, _, later = write(world, ROOMY)
    for row, name in enumerate(plans):
        for layer in (0, 1):
            one = stored(world, together, layer, row, plans[name])
            other = stored(world, apart, layer, row, later[name])
            assert torch.equal(one.positions, other.positions)
            assert torch.equal(one.keys.index, other.keys.index)
            torch.testing.assert_close(one.values.read(), other.values.read())


def test_warming_up_touches_the_null_block_alone(world: World) -> None:
    before = [cache.clone() for cache in world.caches]
    config = parse_config(SETTING)
    compactor = with_books(world.compactor(config))
    sample = torch.zeros(HEADS, DIM, device=DEVICE)
    samples = {layer.name: sample for layer in compactor.layers}
    warm_up(compactor, [config], BLOCK, samples)
    warm_up_books(books_of(compactor), compactor, [config], BLOCK, samples)
    reader = CodebookReader(State({}), compactor.layers, torch.device(DEVICE))
    if is_strided(world):
        reader._attend = codebook_attention.codebook_attention
    reader.warm_up({layer.name: sample[None] for layer in compactor.layers})
    null = 2 if is_strided(world) else 1  # blocks of the view
    for now, then in zip(world.caches, before, strict=True):
        assert torch.equal(now[null:].nan_to_num(7.0), then[null:].nan_to_num(7.0))
        assert not torch.equal(now[:null], then[:null]), "something was written"
    assert books_of(compactor).take_measures() is None

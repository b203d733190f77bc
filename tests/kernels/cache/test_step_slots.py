"""Slots and lengths of a step: hand-written tables and loops."""

import pytest
import torch

from tests.kernels.paged import DEVICE
from vllm_kvcompress.kernels import torch_backend as torch_version
from vllm_kvcompress.kernels.cache import step_slots as kernel
from vllm_kvcompress.kernels.cache.block_tables import BlockTables

VERSIONS = pytest.mark.parametrize("module", [kernel, torch_version], ids=["triton", "torch"])


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch) -> None:
    """Rows take several tiles of tokens, and batches several programs."""
    monkeypatch.setattr(kernel, "ROW_TILE", 4)
    monkeypatch.setattr(kernel, "TOKEN_TILE", 4)


def ints(values, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def longs(values) -> torch.Tensor:
    return ints(values, torch.int64)


@VERSIONS
def test_lengths_lose_what_was_evicted_and_padding_is_zeroed_in_place(module) -> None:
    out = torch.full((2, 6), 99, dtype=torch.int32, device=DEVICE)
    address = out.data_ptr()
    module.physical_seq_lens(
        seq_lens=ints([100, 40, 7, 7]),
        idx_mapping=longs([2, 0]),
        evicted=ints([[8, 0, 64], [0, 0, 32]]),
        out=out,
    )
    assert out.tolist() == [[36, 32, 0, 0, 99, 99], [68, 40, 0, 0, 99, 99]]
    assert out.data_ptr() == address, "full CUDA graphs replay this address"


@VERSIONS
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("num_rows", "num_padded"), [(1, 1), (4, 4), (5, 9), (0, 3), (9, 9)])
def test_lengths_match_loops(module, num_rows: int, num_padded: int, index_dtype) -> None:
    """Dummies among the rows; the row stride of `evicted` and `out` is larger than their width."""
    generator = torch.Generator().manual_seed(num_rows)
    seq_lens = torch.randint(50, 90, (num_padded,), generator=generator).int()
    idx_mapping = torch.randperm(12, generator=generator)[:num_rows] - 2  # two are negative
    idx_mapping.clamp_(min=-1)
    evicted = torch.randint(0, 50, (3, 20), generator=generator).int()[:, 5:15]
    out = torch.full((3, 16), 99, dtype=torch.int32, device=DEVICE)
    module.physical_seq_lens(
        seq_lens.to(DEVICE), idx_mapping.to(DEVICE, index_dtype), evicted.to(DEVICE), out[:, :12]
    )
    for group in range(3):
        for row in range(16):
            expected = 99 if row >= num_padded else 0
            if row < num_rows and idx_mapping[row] >= 0:
                expected = int(seq_lens[row] - evicted[group, idx_mapping[row]])
            assert out[group, row] == expected


@VERSIONS
def test_slots_of_a_small_table_by_hand(module) -> None:
    # Two rows, block size 4. Row 5 lost 8 tokens: logical 10 is physical 2, in its first block.
    table = torch.zeros(6, 4, dtype=torch.int32, device=DEVICE)
    table[5] = ints([7, 3, 0, 0])
    table[1] = ints([2, 9, 4, 0])
    out = torch.full((1, 8), -1, dtype=torch.int64, device=DEVICE)
    module.physical_slots(
        positions=longs([10, 11, 12, 3, 4]),
        query_start_loc=ints([0, 3, 5, 5]),
        idx_mapping=longs([5, 1]),
        evicted=ints([[0, 0, 0, 0, 0, 8]]),
        tables=BlockTables.of([table], [4]),
        out=out,
    )
    assert out.tolist() == [[7 * 4 + 2, 7 * 4 + 3, 3 * 4 + 0, 2 * 4 + 3, 9 * 4 + 0, -1, -1, -1]]


@VERSIONS
def test_a_token_outside_its_row_of_the_table_has_no_slot(module) -> None:
    """It would be another request's. Tokens behind the last row are nobody's."""
    table = ints([[1, 2], [3, 4], [5, 6]])
    out = torch.full((1, 5), -7, dtype=torch.int64, device=DEVICE)
    module.physical_slots(
        positions=longs([3, 4, 11, 12, 4]),
        query_start_loc=ints([0, 4]),
        idx_mapping=longs([1]),
        evicted=ints([[0, 4, 0]]),
        tables=BlockTables.of([table], [4]),
        out=out,
    )
    assert out.tolist() == [[-1, 3 * 4, 4 * 4 + 3, -1, -7]]


def random_step(counts: list[int], seed: int = 0, num_requests: int = 9):
    """Positions, query_start_loc with padding, and rows of which the second is a dummy."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(48, 80, (len(counts),), generator=generator).tolist()
    positions = [s + i for s, n in zip(starts, counts, strict=True) for i in range(n)]
    offsets = [sum(counts[:row]) for row in range(len(counts) + 1)]
    mapping = torch.randperm(num_requests, generator=generator)[: len(counts)].tolist()
    if len(mapping) > 1:
        mapping[1] = -1
    return positions, offsets + offsets[-1:] * 3, mapping, starts


@VERSIONS
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("counts", [[1], [3, 1, 9], [4, 0, 5, 8], [1] * 7, [0, 2, 17]])
def test_slots_match_loops(module, counts: list[int], index_dtype) -> None:
    """Groups with different block sizes and widths; block numbers whose slots pass 2 ** 31."""
    generator = torch.Generator().manual_seed(1)
    block_sizes, widths = [16, 32, 64], [8, 5, 3]
    tables = [
        torch.randint(0, 2**31 - 1, (9, width), generator=generator).int() for width in widths
    ]
    evicted = (torch.randint(0, 3, (3, 12), generator=generator) * 16).int()[:, :9]
    positions, offsets, mapping, _ = random_step(counts)
    out = torch.full((3, 40), -7, dtype=torch.int64, device=DEVICE)
    address = out.data_ptr()
    on_device = [table.to(DEVICE) for table in tables]
    module.physical_slots(
        longs(positions), ints(offsets), ints(mapping, index_dtype), evicted.to(DEVICE),
        BlockTables.of(on_device, block_sizes), out[:, :35],
    )  # fmt: skip
    assert out.data_ptr() == address
    for group, size in enumerate(block_sizes):
        for row, request in enumerate(mapping):
            for token in range(offsets[row], offsets[row + 1]):
                index = positions[token] - int(evicted[group, request])
                expected = -7  # dummies keep what the host wrote
                if request >= 0:
                    block = int(tables[group][request, index // size])
                    expected = block * size + index % size
                assert out[group, token] == expected
        assert (out[group, len(positions) :] == -7).all()


@VERSIONS
def test_tables_change_in_place(module) -> None:
    """A staged write reaches the next step without a new `BlockTables`."""
    table = torch.zeros(2, 3, dtype=torch.int32, device=DEVICE)
    tables = BlockTables.of([table, table.clone()], [4, 8])
    out = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    table[1, 0] = 5
    step = longs([2]), ints([0, 1]), longs([1]), torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)
    module.physical_slots(*step, tables, out)
    assert out.tolist() == [[22], [2]]


@VERSIONS
def test_ring_of_a_small_step_by_hand(module) -> None:
    # Slots of 4 queries. Request 2 computes 6 tokens, of which the last 4 are kept; request 0
    # decodes; the dummy's token and the padding have no slot.
    out = torch.full((11,), 99, dtype=torch.int64, device=DEVICE)
    address = out.data_ptr()
    module.ring_slots(
        positions=longs([0, 1, 2, 3, 4, 5, 9, 7]),
        query_start_loc=ints([0, 6, 7, 8, 8]),
        seq_lens=ints([6, 10, 8, 0]),
        idx_mapping=longs([2, 0, -1]),
        slots=ints([7, -1, 2]),
        size=4,
        out=out,
    )
    assert out.tolist() == [-1, -1, 8 + 2, 8 + 3, 8 + 0, 8 + 1, 28 + 1, -1, -1, -1, -1]
    assert out.data_ptr() == address


@VERSIONS
@pytest.mark.parametrize("size", [1, 5, 64])
@pytest.mark.parametrize("counts", [[1], [3, 1, 9], [4, 0, 5, 8], [1] * 7, [0, 2, 17]])
def test_ring_matches_loops(module, counts: list[int], size: int) -> None:
    """Drafts too: a row may be shorter after the step than the positions it computed."""
    positions, offsets, mapping, starts = random_step(counts, seed=3)
    seq_lens = [starts[row] + count - row % 2 for row, count in enumerate(counts)]
    out = torch.full((40,), 99, dtype=torch.int64, device=DEVICE)
    padded = longs(positions + [50, 51])  # behind the last row: nobody's
    owned = torch.randperm(60, generator=torch.Generator().manual_seed(size))[:40].tolist()
    owned = [-1 if slot % 3 == 0 else slot for slot in owned]
    step = padded, ints(offsets), ints(seq_lens + [0]), ints(mapping)
    module.ring_slots(*step, ints(owned), size, out)
    expected = [-1] * 40
    for row, request in enumerate(mapping):
        for token in range(offsets[row], offsets[row + 1]):
            kept = request >= 0 and owned[request] >= 0
            if kept and positions[token] >= seq_lens[row] - size:
                expected[token] = owned[request] * size + positions[token] % size
    assert out.tolist() == expected


@VERSIONS
def test_an_empty_step_only_pads(module) -> None:
    out = torch.full((6,), 99, dtype=torch.int64, device=DEVICE)
    nothing = longs([])
    module.ring_slots(nothing, ints([0]), ints([]), nothing, ints([0]), 4, out)
    assert out.tolist() == [-1] * 6
    slots = torch.full((1, 3), 99, dtype=torch.int64, device=DEVICE)
    table = BlockTables.of([torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)], [4])
    module.physical_slots(nothing, ints([0]), nothing, ints([[0, 0]]), table, slots)
    assert slots.tolist() == [[99] * 3]


@VERSIONS
def test_refuses_outputs_that_would_be_overrun(module) -> None:
    table = BlockTables.of([torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)], [4])
    row = longs([0])
    with pytest.raises(ValueError, match="1 groups of 2 do not fit"):
        module.physical_slots(longs([0, 1]), ints([0, 2]), row, ints([[0, 0]]), table, longs([[0]]))
    with pytest.raises(ValueError, match="2 groups of 1 do not fit"):
        module.physical_seq_lens(ints([5]), row, ints([[0], [0]]), ints([[0]]))
    with pytest.raises(ValueError, match="2 tokens do not fit 1 slots"):
        module.ring_slots(longs([0, 1]), ints([0, 2]), ints([2]), row, ints([0]), 4, longs([0]))
    with pytest.raises(ValueError, match="at least one query per request, got 0"):
        module.ring_slots(longs([0]), ints([0, 1]), ints([1]), row, ints([0]), 0, longs([0]))


def test_block_tables_are_contiguous_matrices_with_a_block_size_each() -> None:
    table = torch.zeros(4, 6, dtype=torch.int32)
    tables = BlockTables.of([table, table[:2]], [16, 32])
    assert tables.num_groups == 2
    assert tables.pointers.tolist() == [table.data_ptr()] * 2
    assert tables.strides.tolist() == [6, 6] and tables.strides.dtype == torch.int64
    assert tables.block_sizes.tolist() == [16, 32] and tables.block_sizes.dtype == torch.int32
    with pytest.raises(ValueError, match="2 block tables, but 1 block sizes"):
        BlockTables.of([table, table], [16])
    with pytest.raises(ValueError, match="0 block tables"):
        BlockTables.of([], [])
    for wrong in (table.long(), table[:, :3], table[0]):
        with pytest.raises(ValueError, match="contiguous int32 matrix"):
            BlockTables.of([wrong], [16])


def sm90_launches() -> None:
    """A step of 8,192 tokens."""
    evicted = torch.zeros(1, 256, dtype=torch.int32)
    tables = BlockTables.of([torch.zeros(256, 8192, dtype=torch.int32)], [16])
    rows = torch.zeros(256, dtype=torch.int64)
    positions = torch.zeros(8192, dtype=torch.int64)
    starts = torch.zeros(257, dtype=torch.int32)
    lengths, slots = torch.zeros(256, dtype=torch.int32), torch.zeros(8192, dtype=torch.int64)
    kernel.physical_seq_lens(lengths, rows, evicted, torch.zeros(1, 256, dtype=torch.int32))
    kernel.physical_slots(positions, starts, rows, evicted, tables, slots[None])
    kernel.ring_slots(positions, starts, lengths, rows, lengths, 32, slots)

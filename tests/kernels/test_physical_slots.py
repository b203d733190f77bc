"""Slots and lengths against hand-written tables and loops."""

import torch

from vllm_kvcompress.kernels.physical_slots import physical_seq_lens, physical_slots


def test_slots_of_a_small_table_by_hand() -> None:
    # Two rows, block size 4. Row 5 lost 8 tokens: logical 10 is physical 2, in its first block.
    table = torch.zeros(6, 4, dtype=torch.int32)
    table[5] = torch.tensor([7, 3, 0, 0])
    table[1] = torch.tensor([2, 9, 4, 0])
    evicted = torch.tensor([[0, 0, 0, 0, 0, 8]], dtype=torch.int32)
    out = torch.full((1, 8), -1, dtype=torch.int64)
    physical_slots(
        positions=torch.tensor([10, 11, 12, 3, 4]),
        query_start_loc=torch.tensor([0, 3, 5, 5], dtype=torch.int32),
        idx_mapping=torch.tensor([5, 1]),
        evicted=evicted,
        block_tables=[table],
        block_sizes=[4],
        out=out,
    )
    assert out.tolist() == [[7 * 4 + 2, 7 * 4 + 3, 3 * 4 + 0, 2 * 4 + 3, 9 * 4 + 0, -1, -1, -1]]


def test_slots_match_loops_for_many_groups_and_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    num_groups, num_rows, block_size = 3, 7, 16
    tables = [
        torch.randperm(num_rows * 8, generator=generator).int().view(num_rows, 8)
        for _ in range(num_groups)
    ]
    evicted = torch.randint(0, 3, (num_groups, num_rows), generator=generator).int() * block_size
    idx_mapping = torch.tensor([4, 0, 6])
    lengths = [3, 1, 9]
    starts = [40, 33, 50]
    positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    query_start_loc = torch.tensor([0, 3, 4, 13], dtype=torch.int32)
    out = torch.zeros(num_groups, 20, dtype=torch.int64)
    physical_slots(
        positions, query_start_loc, idx_mapping, evicted, tables, [block_size] * num_groups, out
    )
    token = 0
    for row, (start, count) in enumerate(zip(starts, lengths, strict=True)):
        request = idx_mapping[row].item()
        for position in range(start, start + count):
            for group in range(num_groups):
                index = position - evicted[group, request].item()
                block = tables[group][request, index // block_size].item()
                assert out[group, token] == block * block_size + index % block_size
            token += 1


def test_lengths_lose_what_was_evicted_and_padding_is_zeroed_in_place() -> None:
    out = torch.full((2, 6), 99, dtype=torch.int32)
    address = out.data_ptr()
    physical_seq_lens(
        seq_lens=torch.tensor([100, 40, 7, 7], dtype=torch.int32),
        idx_mapping=torch.tensor([2, 0]),
        evicted=torch.tensor([[8, 0, 64], [0, 0, 32]], dtype=torch.int32),
        out=out,
    )
    assert out.tolist() == [[36, 32, 0, 0, 99, 99], [68, 40, 0, 0, 99, 99]]
    assert out.data_ptr() == address, "full CUDA graphs replay this address"

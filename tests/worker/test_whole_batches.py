"""Steps of which no request has lost anything: as vLLM has them, and as full graphs replay them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode

from vllm_kvcompress.worker.group_metadata import Families
from vllm_kvcompress.worker.lengths import EvictedLengths
from vllm_kvcompress.worker.model_state import CompressionStateMixin

NUM_GROUPS, NUM_ROWS = 2, 6
GRAPHS = CUDAGraphMode


class Batch:
    """What is read of the host's."""

    def __init__(self, rows: list[int]) -> None:
        self.req_ids = [f"request {row}" for row in rows]
        self.idx_mapping = torch.tensor(rows)
        self.idx_mapping_np = self.idx_mapping.numpy()
        self.seq_lens = torch.tensor([100 + row for row in rows] + [0], dtype=torch.int32)
        self.seq_lens_cpu_upper_bound = self.seq_lens.clone()
        self.query_start_loc = torch.arange(len(rows) + 1, dtype=torch.int32)
        self.query_start_loc_np = self.query_start_loc.numpy()


@pytest.fixture
def lengths() -> Any:
    """Lengths that count their launches; row 3 has lost 32 slots of the second group."""
    lengths: Any = EvictedLengths(NUM_GROUPS, NUM_ROWS, torch.device("cpu"))
    launch, lengths.launches = lengths._physical_seq_lens, 0

    def counted(*args: Any) -> None:
        lengths.launches += 1
        launch(*args)

    lengths._physical_seq_lens = counted
    lengths.add_evicted(0, 3, 0)
    lengths.add_evicted(1, 3, 32)
    return lengths


def test_lengths_of_a_whole_batch_are_written_if_somebody_asks(lengths: Any) -> None:
    batch: Any = Batch([1, 2])
    assert not lengths.begin_batch(batch)
    assert lengths.is_whole(batch) and lengths.launches == 0
    assert lengths.max_seq_lens(batch, 2) == [102, 102]
    assert lengths.group_upper_bound(batch, 1) is batch.seq_lens_cpu_upper_bound
    assert not lengths.have_lost(batch).any() and lengths.launches == 0
    for _ in range(2):
        assert lengths.group_seq_lens(batch)[:, :3].tolist() == [[101, 102, 0]] * 2
    assert lengths.launches == 1


def test_lengths_of_others_are_written_at_once(lengths: Any) -> None:
    lengths.begin_batch(Batch([1, 2]))
    batch: Any = Batch([3, 1])
    assert lengths.begin_batch(batch) and lengths.launches == 1
    assert not lengths.is_whole(batch)
    assert lengths.seq_lens[:, :3].tolist() == [[103, 101, 0], [71, 101, 0]]
    assert lengths.max_seq_lens(batch, 2) == [103, 101]
    assert lengths.group_upper_bound(batch, 1).tolist() == [71, 101, 0]
    assert lengths.have_lost(batch).tolist() == [True, False]


def test_a_row_that_starts_over_is_whole(lengths: Any) -> None:
    batch: Any = Batch([3, 1])
    assert lengths.begin_batch(batch)
    lengths.reset_row(3)
    lengths.reset_row(1)
    assert not lengths.begin_batch(batch) and lengths.is_whole(batch)
    assert lengths.group_seq_lens(batch)[:, :3].tolist() == [[103, 101, 0]] * 2
    assert not lengths.evicted.gpu.any()


def test_only_the_current_batch_is_known_to_be_whole(lengths: Any) -> None:
    """A dummy batch of a graph's capture never went through `begin_batch`."""
    lengths.begin_batch(Batch([1, 2]))
    dummy: Any = Batch([3])
    assert not lengths.is_whole(dummy)
    assert lengths.group_seq_lens(dummy)[:, :2].tolist() == [[103, 0]] * 2


def test_hidden_rows_of_a_whole_batch_stay_hidden(lengths: Any) -> None:
    batch: Any = Batch([1, 2])
    lengths.begin_batch(batch)
    lengths.hide(0, np.array([1]))
    assert lengths.group_seq_lens(batch)[:, :3].tolist() == [[101, 1, 0], [101, 102, 0]]
    assert lengths.group_upper_bound(batch, 0).tolist() == [101, 1, 0]
    assert lengths.max_seq_lens(batch, 2) == [101, 102]
    lengths.begin_batch(batch)
    assert lengths.max_seq_lens(batch, 2) == [102, 102]


@pytest.fixture
def state(lengths: Any) -> Any:
    state: Any = object.__new__(CompressionStateMixin)
    state.model_config = SimpleNamespace(is_mm_prefix_lm=False)
    state.lengths = lengths
    return state


@pytest.mark.parametrize("mode", [GRAPHS.NONE, GRAPHS.PIECEWISE])
def test_a_whole_batch_is_handed_on_as_it_is(state: Any, mode: CUDAGraphMode) -> None:
    batch: Any = Batch([1, 2])
    state.lengths.begin_batch(batch)
    assert state._seen_by_one(Families(0, (), ()), batch, mode) is batch
    assert state.lengths.launches == 0


@pytest.mark.parametrize(
    ("rows", "mode", "seen"),
    [([1, 2], GRAPHS.FULL, [101, 102, 0]), ([3, 1], GRAPHS.NONE, [71, 101, 0])],
)
def test_full_graphs_and_compacted_requests_read_our_lengths(
    state: Any, rows: list[int], mode: CUDAGraphMode, seen: list[int]
) -> None:
    """A captured graph reads one address for good, whatever the batch has lost."""
    batch: Any = Batch(rows)
    state.lengths.begin_batch(batch)
    found = state._seen_by_one(Families(1, (), ()), batch, mode)
    assert found.seq_lens.tolist() == seen
    assert found.seq_lens.data_ptr() == state.lengths.seq_lens[1].data_ptr()
    assert found is not batch and batch.seq_lens[0] == 100 + rows[0]


def test_one_group_alone_is_one() -> None:
    assert Families(1, (), ()).is_one
    for others in (
        Families(None, (), ()),
        Families(0, (1,), ()),
        Families(0, (), (1,)),
        Families(0, (), (), (), frozenset({1})),
    ):
        assert not others.is_one

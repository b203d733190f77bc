"""The ring of recent queries against a plain record of what every row computed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.lengths.decode_queries import RingShape
from vllm_kvcompress.worker.queries.ring import QueryRing

NUM_ROWS, WINDOW = 4, 8


def make_ring(num_spec_tokens: int = 0) -> QueryRing:
    """A slot per row, given out backwards."""
    num_drafts = 2 * (num_spec_tokens + 1) if num_spec_tokens else 0
    shape = RingShape(WINDOW, WINDOW + num_drafts, NUM_ROWS)
    ring = QueryRing(shape, NUM_ROWS, 64, torch.device("cpu"))
    ring.add_layer("layer", num_heads=2, head_dim=4, dtype=torch.float32)
    for row in range(NUM_ROWS):
        ring.assign(row, NUM_ROWS - 1 - row)
    return ring


def query_at(row: int, position: int, attempt: int = 0) -> torch.Tensor:
    """[2, 4], telling row, position and (for drafts) attempt."""
    return torch.full((2, 4), 10_000.0 * row + position + attempt / 8)


def run(ring: QueryRing, rows: list[tuple[int, int, int]], attempt: int = 0, padding: int = 5):
    """A step of (request row, tokens before, tokens of this step), padded as graphs are."""
    positions = [start + i for _, start, count in rows for i in range(count)]
    starts = [0]
    for _, _, count in rows:
        starts.append(starts[-1] + count)
    ring.begin_batch(
        SimpleNamespace(
            positions=torch.tensor(positions + [0] * padding),
            num_tokens=len(positions),
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor([start + count for _, start, count in rows], dtype=torch.int32),
            idx_mapping=torch.tensor([row for row, _, _ in rows]),
            idx_mapping_np=np.array([row for row, _, _ in rows]),
        )
    )
    queries = [query_at(row, start + i, attempt) for row, start, n in rows for i in range(n)]
    ring.record("layer", torch.stack(queries + [torch.full((2, 4), -1.0)] * padding))
    ring.end_batch()


def expected(row: int, position: int, window: int = WINDOW) -> torch.Tensor:
    each = [query_at(row, p) for p in range(position - window, position)]
    return torch.stack(each, dim=1)


def test_decoding_rows_keep_their_own_queries() -> None:
    ring = make_ring()
    run(ring, [(2, 0, 30), (0, 5, 12)])
    for step in range(20):
        run(ring, [(0, 17 + step, 1), (2, 30 + step, 1)])
    assert torch.equal(ring.take(0, "layer", 37, WINDOW), expected(0, 37))
    assert torch.equal(ring.take(2, "layer", 50, WINDOW), expected(2, 50))
    assert torch.equal(ring.take(2, "layer", 50, 3), expected(2, 50, 3))


def test_dummy_batches_write_where_nobody_reads() -> None:
    ring = make_ring()
    run(ring, [(1, 0, 20)])
    ring.record("layer", torch.full((64, 2, 4), -1.0))  # a replayed graph without `begin_batch`
    assert torch.equal(ring.take(1, "layer", 20, WINDOW), expected(1, 20))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=30))
def test_rejected_drafts_leave_the_window_alone(steps: list[tuple[int, int]]) -> None:
    """Each step runs one certain token and some drafts, of which some are accepted."""
    ring = make_ring(num_spec_tokens=4)
    run(ring, [(3, 0, 16)])
    length = 16
    for attempt, (num_drafts, num_accepted) in enumerate(steps):
        # What is rejected is computed again, as the same position: only then is it right.
        accepted = min(num_drafts, num_accepted)
        run(ring, [(3, length, 1 + num_drafts)], attempt=attempt + 1)
        run(ring, [(3, length, 1 + accepted)])  # the accepted ones, as they should be
        length += 1 + accepted
        assert torch.equal(ring.take(3, "layer", length, WINDOW), expected(3, length))


def test_no_window_no_ring() -> None:
    ring = QueryRing(RingShape(0, 0, 0), NUM_ROWS, 64, torch.device("cpu"))
    ring.add_layer("layer", 2, 4, torch.float32)
    assert not ring.is_active and ring.num_bytes == 0
    with pytest.raises(AssertionError):
        ring.take(0, "layer", 20, 8)


def test_the_ring_is_written_at_addresses_that_do_not_change() -> None:
    """Full CUDA graphs replay addresses."""
    ring = make_ring()
    before = (ring._places.data_ptr(), ring._layers["layer"].data_ptr())
    run(ring, [(0, 0, 12)])
    run(ring, [(0, 12, 1), (1, 3, 4)])
    assert (ring._places.data_ptr(), ring._layers["layer"].data_ptr()) == before


def test_rows_without_a_slot_write_nothing_and_read_nothing() -> None:
    ring = make_ring()
    ring.assign(1, -1)
    run(ring, [(0, 0, 20), (1, 0, 20)])
    before = ring._layers["layer"].clone()
    run(ring, [(1, 20, 1)])
    assert torch.equal(ring._layers["layer"], before)
    assert torch.equal(ring.take(0, "layer", 20, WINDOW), expected(0, 20))
    with pytest.raises(RuntimeError, match="row 1 is compacted at 21 tokens and its queries"):
        ring.take(1, "layer", 21, WINDOW)


def test_a_slot_that_changes_hands_holds_its_owners_queries() -> None:
    """As the scheduler hands it on: the new owner records a whole window before it is read."""
    ring = make_ring()
    for row in range(NUM_ROWS):
        ring.assign(row, -1)
    length, owner = dict.fromkeys(range(NUM_ROWS), 30), 0
    ring.assign(owner, 2)
    for _ in range(4 * WINDOW):
        run(ring, [(row, length[row], 1) for row in reversed(range(NUM_ROWS))])
        length = {row: tokens + 1 for row, tokens in length.items()}
        if (length[owner] - 30) % WINDOW == 0:
            found = ring.take(owner, "layer", length[owner], WINDOW)
            assert torch.equal(found, expected(owner, length[owner]))
            ring.assign(owner, -1)
            owner = (owner + 1) % NUM_ROWS
            ring.assign(owner, 2)

"""Queries of the observation window, collected over chunks and mixed batches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_kvcompress.worker.queries.taps import QueryTaps
from vllm_kvcompress.worker.queries.window import QueryWindow


def batch(rows: list[tuple[str, int, int]]) -> SimpleNamespace:
    """Rows of (request id, tokens computed before, tokens of this step)."""
    counts = np.array([count for _, _, count in rows], dtype=np.int32)
    return SimpleNamespace(
        req_ids=[name for name, _, _ in rows],
        num_computed_tokens_np=np.array([start for _, start, _ in rows]),
        num_scheduled_tokens=counts,
        query_start_loc_np=np.concatenate([[0], np.cumsum(counts)]),
    )


def queries_of(rows: list[tuple[str, int, int]]) -> torch.Tensor:
    """[T, 2, 4] queries whose values tell request and position."""
    values = [1000.0 * ord(name) + start + i for name, start, count in rows for i in range(count)]
    return torch.tensor(values)[:, None, None].expand(-1, 2, 4).clone()


def run(window: QueryWindow, rows: list[tuple[str, int, int]]) -> None:
    window.begin_batch(batch(rows))
    if window._captures:
        window.record("layer", queries_of(rows))
    window.end_batch()


def expected(name: str, start: int, end: int) -> torch.Tensor:
    return queries_of([(name, start, end - start)]).transpose(0, 1)


@pytest.mark.parametrize("chunks", [[100], [50, 50], [99, 1], [84, 16], [85, 15], [90, 3, 3, 3, 1]])
def test_any_chunking_gives_the_same_queries(chunks: list[int]) -> None:
    window = QueryWindow(torch.device("cpu"))
    window.add_request("a", [100], window=16)
    done = 0
    for count in chunks:
        run(window, [("z", 40, 1), ("a", done, count), ("y", 7, 2)])
        done += count
    assert torch.equal(window.take("a", "layer", 100), expected("a", 84, 100))


def test_two_requests_in_one_batch() -> None:
    window = QueryWindow(torch.device("cpu"))
    window.add_request("a", [20], 8)
    window.add_request("b", [33], 8)
    run(window, [("b", 20, 13), ("a", 0, 20)])
    assert torch.equal(window.take("a", "layer", 20), expected("a", 12, 20))
    assert torch.equal(window.take("b", "layer", 33), expected("b", 25, 33))


def test_windows_that_begin_in_different_steps_and_end_in_one() -> None:
    """Each has a buffer of its own; requests that begin together share one."""
    window = QueryWindow(torch.device("cpu"))
    window.add_request("a", [20], 8)
    window.add_request("b", [33], 8)
    window.add_request("c", [9], 4)
    run(window, [("a", 0, 15)])
    run(window, [("c", 0, 9), ("a", 15, 5), ("b", 20, 13)])
    assert torch.equal(window.take("a", "layer", 20), expected("a", 12, 20))
    assert torch.equal(window.take("b", "layer", 33), expected("b", 25, 33))
    assert torch.equal(window.take("c", "layer", 9), expected("c", 5, 9))
    assert window._stashes["b"][0].buffer is window._stashes["c"][0].buffer


def test_a_resumed_request_keeps_only_prompt_queries() -> None:
    window = QueryWindow(torch.device("cpu"))
    window.add_request("a", [20], 8)
    run(window, [("a", 0, 20)])
    run(window, [("a", 20, 5)])
    assert torch.equal(window.take("a", "layer", 20), expected("a", 12, 20))


def test_nothing_is_collected_outside_the_window_or_after_removal() -> None:
    window = QueryWindow(torch.device("cpu"))
    window.add_request("a", [100], 16)
    assert not window.wants("a", 0, 84) and window.wants("a", 0, 85)
    assert window.wants("a", 99, 1) and not window.wants("a", 100, 1)
    run(window, [("a", 0, 84)])
    assert window._stashes["a"][0].buffer is None, "no memory before the window starts"
    window.remove_request("a")
    assert not window.wants("a", 90, 10)


def test_missing_queries_are_an_error_not_a_guess() -> None:
    window = QueryWindow(torch.device("cpu"))
    window.add_request("a", [100], 16)
    run(window, [("a", 90, 10)])
    with pytest.raises(RuntimeError, match="10 of 16 queries"):
        window.take("a", "layer", 100)
    with pytest.raises(RuntimeError, match="0 of 16 queries"):
        window.take("a", "another layer", 100)


def test_a_restarted_request_collects_anew() -> None:
    window = QueryWindow(torch.device("cpu"))
    window.add_request("a", [100], 16)
    run(window, [("a", 80, 10)])
    window.remove_request("a")
    window.add_request("a", [100], 16)
    run(window, [("a", 0, 100)])
    assert torch.equal(window.take("a", "layer", 100), expected("a", 84, 100))


def test_watching_a_layer_changes_nothing_else() -> None:
    calls = []

    class Impl:
        def forward(self, layer, query, key, output=None):
            calls.append((layer, query, key, output))
            return "result"

    impl, window = Impl(), QueryWindow(torch.device("cpu"))
    taps = QueryTaps([window], torch.float32)
    taps.watch("layer", impl)
    assert impl.forward("l", torch.zeros(3, 2, 4), "k", output="o") == "result"
    window.add_request("a", [3], 2)
    window.begin_batch(batch([("a", 0, 3)]))
    with taps.muted():
        assert impl.forward("l", torch.full((3, 2, 4), 9.0), "k") == "result"
    impl.forward("l", queries_of([("a", 0, 3)]), "k")
    assert len(calls) == 3
    assert torch.equal(window.take("a", "layer", 3), expected("a", 1, 3))


def test_a_batch_is_looked_at_only_while_a_prompt_is_awaited() -> None:
    """Steps of requests that only decode must not pay for a loop over the batch."""
    window = QueryWindow(torch.device("cpu"))
    assert not window.awaits_requests
    window.add_request("a", [20], 8)
    assert window.awaits_requests
    window.remove_request("a")
    assert not window.awaits_requests


@pytest.mark.parametrize("chunks", [[100], [40, 60], [30, 10, 20, 40], [36, 8, 46, 7, 3]])
def test_windows_inside_a_prompt_are_kept_beside_that_of_its_end(chunks: list[int]) -> None:
    window = QueryWindow(torch.device("cpu"))
    window.add_request("a", [40, 80, 100], 8)
    window.add_request("b", [50], 8)
    done = 0
    for count in chunks:
        run(window, [("a", done, count), ("b", done, min(count, 100 - done))])
        done += count
        if 40 <= done < 80:
            window.remove_request("a", 40)  # compacted there
    for end in (80, 100):
        assert torch.equal(window.take("a", "layer", end), expected("a", end - 8, end))
    window.remove_request("a", 80)
    assert torch.equal(window.take("a", "layer", 100), expected("a", 92, 100))
    assert torch.equal(window.take("b", "layer", 50), expected("b", 42, 50))
    window.remove_request("a", 100)
    window.remove_request("b")
    assert not window.awaits_requests

"""Folding of whole prompts: every token once, in order, whatever the chunks and the batch."""

import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_kvcompress.kernels.cache.rows import DenseRows
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ChunkInputs, Queries, ScoreInputs
from vllm_kvcompress.worker.queries.prompt import PromptQueries
from vllm_kvcompress.worker.queries.taps import QueryTaps

LAYERS = [SimpleNamespace(name=name, scale=0.5, rotary=None) for name in ("first", "second")]


class Recorder(Policy):
    """Keeps a list of what it was given."""

    @property
    def queries(self) -> Queries:
        return Queries.PROMPT

    def accumulate(self, accumulated: Any, chunk: ChunkInputs) -> list[float]:
        assert chunk.keys.shape[1] == chunk.start + chunk.queries.shape[1]
        return [*(accumulated or []), *chunk.queries[0, :, 0].tolist()]

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        raise NotImplementedError


def rows_so_far(layer: Any, row: int, count: int, queries: torch.Tensor) -> DenseRows:
    return DenseRows(torch.zeros(1, count, 4), torch.zeros(1, count, 4), queries, layer.scale)


def make_prompts(read_rows: Any = rows_so_far) -> PromptQueries:
    prompts = PromptQueries()
    prompts.bind(LAYERS, read_rows)
    return prompts


def begin(prompts: PromptQueries, rows: list[tuple[str, int, int]]) -> None:
    counts = np.array([count for _, _, count in rows])
    prompts.begin_batch(
        SimpleNamespace(
            req_ids=[name for name, _, _ in rows],
            num_computed_tokens_np=np.array([start for _, start, _ in rows]),
            num_scheduled_tokens=counts,
            query_start_loc_np=np.concatenate([[0], np.cumsum(counts)]),
            idx_mapping_np=np.arange(len(rows)),
        )
    )


def step(prompts: PromptQueries, rows: list[tuple[str, int, int]], layers=LAYERS) -> None:
    """One step of (request id, tokens before, tokens of this step)."""
    begin(prompts, rows)
    values = [1000.0 * ord(name) + start + i for name, start, count in rows for i in range(count)]
    for layer in layers:
        query = torch.tensor(values)[:, None, None].expand(-1, 2, 4).clone()
        if prompts.is_active:
            prompts.record(layer.name, query)
        query.zero_()  # the activation's memory is used again
    prompts.end_batch()


def expected(name: str, count: int) -> list[float]:
    return [1000.0 * ord(name) + i for i in range(count)]


@pytest.mark.parametrize("chunks", [[100], [64, 36], [1] * 10 + [90], [99, 1]])
def test_any_chunking_gives_the_same_summary(chunks: list[int]) -> None:
    prompts = make_prompts()
    prompts.add_request("a", Recorder(), 100, 4)
    done = 0
    for count in chunks:
        step(prompts, [("z", 7, 1), ("a", done, count), ("y", 0, 3)])
        done += count
    for layer in LAYERS:
        assert prompts.take("a", layer.name) == expected("a", 100)


def test_requests_do_not_mix_and_tokens_behind_the_prompt_do_not_count() -> None:
    prompts = make_prompts()
    prompts.add_request("a", Recorder(), 20, 4)
    prompts.add_request("b", Recorder(), 10, 4)
    step(prompts, [("b", 0, 12), ("a", 0, 15)])
    step(prompts, [("a", 15, 5), ("b", 12, 1)])
    assert prompts.take("a", "first") == expected("a", 20)
    assert prompts.take("b", "second") == expected("b", 10)
    assert not prompts.wants("b", 12)


def test_a_restarted_request_starts_from_nothing() -> None:
    prompts = make_prompts()
    prompts.add_request("a", Recorder(), 20, 4)
    step(prompts, [("a", 0, 15)])
    prompts.remove_request("a")
    prompts.add_request("a", Recorder(), 20, 4)
    step(prompts, [("a", 0, 20)])
    assert prompts.take("a", "first") == expected("a", 20)


def test_tokens_that_nobody_saw_leave_that_prompt_without_a_summary() -> None:
    prompts = make_prompts()
    for name in ("d", "c", "b"):
        prompts.add_request(name, Recorder(), 20, 4)
    step(prompts, [("d", 8, 12)])
    step(prompts, [("c", 0, 20)], layers=LAYERS[:1])
    step(prompts, [("b", 0, 20)])
    with pytest.raises(RuntimeError, match="0 tokens of request d were folded when those from"):
        prompts.take("d", "first")
    with pytest.raises(RuntimeError, match="were folded in 1 of 2 layers"):
        prompts.take("c", "first")
    assert prompts.take("b", "second") == expected("b", 20)
    assert not prompts.wants("d", 8), "no graph is avoided for it any more"


def test_a_policy_that_fails_on_a_chunk_fails_for_that_prompt_alone() -> None:
    """In the middle of the forward pass, which goes on."""

    class Picky(Recorder):
        def accumulate(self, accumulated: Any, chunk: ChunkInputs) -> list[float]:
            if chunk.prompt_len == 21 and chunk.start:
                raise ValueError("not this one")
            return super().accumulate(accumulated, chunk)

    prompts = make_prompts()
    prompts.add_request("a", Picky(), 20, 4)
    prompts.add_request("b", Picky(), 21, 4)
    step(prompts, [("a", 0, 12), ("b", 0, 12)])
    step(prompts, [("b", 12, 9), ("a", 12, 8)])
    assert prompts.take("a", "first") == expected("a", 20)
    with pytest.raises(ValueError, match="not this one"):
        prompts.take("b", "first")


def test_a_batch_is_looked_at_only_while_a_prompt_is_awaited() -> None:
    prompts = make_prompts()
    assert not prompts.awaits_requests
    prompts.add_request("a", Recorder(), 20, 4)
    assert prompts.awaits_requests
    prompts.remove_request("a")
    assert not prompts.awaits_requests


class Watcher(Recorder):
    """Looks at how many bytes of queries exist while it folds; they have 7 heads."""

    def accumulate(self, accumulated: Any, chunk: ChunkInputs) -> list[float]:
        SEEN.append(bytes_of_queries())
        return super().accumulate(accumulated, chunk)


SEEN: list[int] = []


def bytes_of_queries() -> int:
    """Of all storages that a tensor with a dimension of 7 lies in."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor) and 7 in each.shape:
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_queries_of_one_layer_at_most_exist_and_none_is_kept() -> None:
    """An 8B model's chunk of 8,192 tokens has 2.15 GB of queries, 67 MB a layer."""
    SEEN.clear()
    prompts = make_prompts()
    prompts.add_request("a", Watcher(), 64, 4)
    others = bytes_of_queries()  # what other tests have left
    one_layer = others + 32 * 7 * 4 * torch.float32.itemsize
    for start in (0, 32):
        begin(prompts, [("a", start, 32)])
        for layer in LAYERS:
            prompts.record(layer.name, torch.ones(32, 7, 4))
            assert bytes_of_queries() == others
        prompts.end_batch()
    assert [one_layer] * 4 == SEEN


def test_keys_of_the_chunk_are_in_the_cache_when_it_is_folded() -> None:
    """Also where a backend's attention writes them itself."""
    cache = torch.full((1, 8, 4), -1.0)
    prompts = make_prompts(
        lambda layer, row, count, queries: DenseRows(cache[:, :count], cache, queries, 1.0)
    )
    summed = []

    class Sum(Recorder):
        def accumulate(self, accumulated: Any, chunk: ChunkInputs) -> None:
            summed.append(chunk.keys.sum().item())

    class Attention:
        def forward(self, layer: Any, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
            cache[0, : len(keys)] = keys
            return query

    impl = Attention()
    taps = QueryTaps([prompts], torch.float32)
    taps.watch("first", impl)
    prompts.add_request("a", Sum(), 8, 4)
    begin(prompts, [("a", 0, 8)])
    query = torch.zeros(8, 2, 4)
    assert impl.forward(None, query, torch.ones(8, 4)) is query
    assert summed == [32.0]

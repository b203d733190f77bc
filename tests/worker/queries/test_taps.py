"""What recorders are shown of the queries that attention layers are handed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_kvcompress.worker.queries.taps import QueryTaps


class Recorder:
    def __init__(self, is_active: bool = True) -> None:
        self.is_active, self.seen = is_active, list[torch.Tensor]()

    def record(self, layer_name: str, query: torch.Tensor) -> None:
        self.seen.append(query)


class Attention:
    """An implementation that takes queries of 8 bits, as FlashAttention 3 does."""

    def __init__(self) -> None:
        self.given = list[torch.Tensor]()

    def forward(self, layer: Any, query: torch.Tensor) -> torch.Tensor:
        self.given.append(query)
        return query


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantised_queries_are_shown_as_the_model_made_them(dtype: torch.dtype) -> None:
    recorders, impl = [Recorder(), Recorder(), Recorder(is_active=False)], Attention()
    QueryTaps(recorders, dtype).watch("first", impl)
    made = torch.randn(7, 4, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    layer = SimpleNamespace(_q_scale=torch.tensor(0.037))
    query = (made / 0.037).to(torch.float8_e4m3fn)
    impl.forward(layer, query)
    assert impl.given[0] is query, "attention gets what it takes"
    for recorder in recorders[:2]:
        (shown,) = recorder.seen
        assert shown.dtype is dtype and shown.is_contiguous()
        exact = query.double() * layer._q_scale.double()
        rounding = max(torch.finfo(dtype).eps / 2, 1e-7)
        torch.testing.assert_close(shown.double(), exact, rtol=rounding, atol=1e-7)
        torch.testing.assert_close(shown.double(), made, rtol=2**-4, atol=2**-10 * 0.037)
    assert not recorders[2].seen


def test_the_scale_is_that_of_the_layer_and_of_the_moment() -> None:
    recorder, impl = Recorder(), Attention()
    QueryTaps([recorder], torch.bfloat16).watch("first", impl)
    query = torch.ones(1, 1, 16).to(torch.float8_e4m3fn)
    layer = SimpleNamespace(_q_scale=torch.tensor(2.0))
    impl.forward(layer, query)
    layer._q_scale.fill_(0.5)
    impl.forward(layer, query)
    assert [float(each[0, 0, 0]) for each in recorder.seen] == [2.0, 0.5]


def test_other_queries_are_shown_as_they_are() -> None:
    recorder, impl = Recorder(), Attention()
    taps = QueryTaps([recorder], torch.bfloat16)
    taps.watch("first", impl)
    query = torch.randn(2, 2, 16, dtype=torch.bfloat16)
    impl.forward(None, query)
    assert recorder.seen == [query] and recorder.seen[0] is query
    with taps.muted():
        impl.forward(None, query)
    assert len(recorder.seen) == 1

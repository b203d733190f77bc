"""Counts of codebooks on their way from the ranks to the metrics."""

import torch

from vllm_kvcompress.worker.codebook.meter import CodebookMeter
from vllm_kvcompress.worker.codebook.writer import CodebookWriter


def test_ranks_are_summed_exactly_in_float32() -> None:
    """vLLM's shared-memory reduction on CPUs has no float64; counts may need more than 24 bits."""
    own = torch.tensor([[2**30 + 1, 7, 2**24 + 1, 0.25], [5, 0, 0, 0]], dtype=torch.float64)
    others = [own, own * 3]

    def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.dtype == torch.float32
        return sum((split(each) for each in others), torch.zeros_like(tensor))

    def split(numbers: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        alone = CodebookWriter(None, lambda tensor: seen.append(tensor) or tensor)
        alone._measures.append(numbers)
        assert torch.equal(alone.take_measures(), numbers)
        return seen[0]

    writer = CodebookWriter(None, all_reduce)
    writer._measures += [own - 1, torch.ones_like(own)]
    assert torch.equal(writer.take_measures(), own * 4)
    assert writer.take_measures() is None
    one_rank = CodebookWriter(None, None)
    one_rank._measures.append(own)
    assert torch.equal(one_rank.take_measures(), own)


def test_steps_are_added_up_until_they_are_asked_for() -> None:
    meter = CodebookMeter(torch.device("cpu"))
    assert meter.take() is None
    meter.add(None)
    meter.add(torch.full((2, 4), 1.5, dtype=torch.float64))
    meter.add(torch.ones(2, 4, dtype=torch.float64))
    assert meter.take() == [[2.5] * 4] * 2
    assert meter.take() is None

"""Tokens of an image that see each other both ways (Gemma 3), once the request has lost tokens."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.attn_utils import compute_mm_prefix_ranges

from vllm_kvcompress.worker.lengths import EvictedLengths
from vllm_kvcompress.worker.model_state import CompressionStateMixin


class Place:
    def extract_embeds_range(self) -> list[tuple[int, int]]:
        return [(100, 163)]


FEATURES: Any = {
    name: [SimpleNamespace(modality="image", mm_position=Place())]
    for name in ("whole", "compacted")
}


@pytest.fixture()
def state() -> CompressionStateMixin:
    """A model state of two groups, in the second of which row 3 has lost tokens."""
    state = object.__new__(CompressionStateMixin)
    state.model_config = SimpleNamespace(is_mm_prefix_lm=True)  # type: ignore[assignment]
    state.lengths = EvictedLengths(2, 4, torch.device("cpu"))
    state.lengths.add_evicted(1, 3, 224)
    return state


class Batch:
    """What is read of the host's."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def batch() -> Any:
    lengths = torch.tensor([360, 170, 0, 0], dtype=torch.int32)
    rows = torch.tensor([1, 3])
    return Batch(
        req_ids=["whole", "compacted"], seq_lens=lengths, idx_mapping=rows,
        idx_mapping_np=rows.numpy(), seq_lens_cpu_upper_bound=lengths.clone(),
    )  # fmt: skip


def ranges(req_ids: list[str]) -> dict[int, list[tuple[int, int]]]:
    """What the host's masks are made from."""
    return compute_mm_prefix_ranges(req_ids=req_ids, mm_features=FEATURES)


def test_places_of_images_are_forgotten_with_the_first_eviction(state) -> None:
    """Its keys have moved: a query in the place where an image was must not see ahead."""
    now = batch()
    state.lengths.begin_batch(now)
    assert ranges(now.req_ids) == {0: [(100, 163)], 1: [(100, 163)]}
    req_ids = state._still_at_images(now)
    assert ranges(req_ids) == {0: [(100, 163)], 1: []}
    for group in (0, 1):
        seen = state._seen_by(group, now, state.lengths.seq_lens, req_ids)
        assert seen.req_ids == req_ids and now.req_ids == ["whole", "compacted"]


def test_a_batch_of_dummies_has_lost_nothing(state) -> None:
    state.lengths.begin_batch(batch())
    assert state._still_at_images(batch()) == ["whole", "compacted"]
    assert not state.lengths.have_lost(batch()).any()


def test_other_models_keep_their_names(state) -> None:
    now = batch()
    state.lengths.begin_batch(now)
    state.model_config.is_mm_prefix_lm = False
    assert state._still_at_images(now) is now.req_ids
    assert list(np.flatnonzero(state.lengths.have_lost(now))) == [1]

"""Scores of a KV cache group's layers side by side, as one launch chooses from them."""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_kvcompress.errors import PolicyError
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.worker.batch import GroupBatch
from vllm_kvcompress.worker.layout.layer_cache import LayerCache


class GroupScores:
    """Scores that are written where the choice reads them, layer by layer.

    Parameters
    ----------
    group : GroupBatch
        R requests.
    num_layers : int
        L, layers of the group on this rank.
    """

    def __init__(self, group: GroupBatch, num_layers: int) -> None:
        self._regions = [plan.lengths.region_len for plan in group.plans]
        self._num_layers, self._num_filled = num_layers, 0
        self._scores: torch.Tensor | None = None

    def add(self, rows: Sequence[torch.Tensor]) -> None:
        """Take the next layer's scores, R tensors [num_kv_heads, >= region] of any float type."""
        if self._scores is None:
            # What lies behind a shorter region is never read: it needs no value.
            self._scores = torch.empty(
                self._num_layers, len(rows), len(rows[0]), max(self._regions),
                dtype=torch.float32, device=rows[0].device,
            )  # fmt: skip
        for request, (row, region) in enumerate(zip(rows, self._regions, strict=True)):
            self._scores[self._num_filled, request, :, :region] = row[:, :region]
        self._num_filled += 1

    @property
    def is_complete(self) -> bool:
        """Whether all layers have been added."""
        return self._num_filled == self._num_layers

    def take(self) -> torch.Tensor:
        """[L, R, num_kv_heads, n] float32, n the longest region; given away once."""
        assert self.is_complete and self._scores is not None
        scores, self._scores = self._scores, None
        return scores


def check_scored(policy: Policy, scored: Any, size: tuple[int, int], layer: LayerCache) -> None:
    """Raise PolicyError unless a policy returned [num_kv_heads, n] float scores.

    What is merely broadcast, or converted, would be another ranking than it meant.
    """
    where = layer.cache().device
    if (
        isinstance(scored, torch.Tensor)
        and tuple(scored.shape) == size
        and scored.is_floating_point()
        and scored.device.type == where.type
    ):
        return
    if isinstance(scored, torch.Tensor):
        got = f"{tuple(scored.shape)} of {str(scored.dtype)[6:]} on {scored.device}"
    else:
        got = type(scored).__name__
    raise PolicyError(
        f"policy {type(policy).__name__}, layer {layer.index}: score() must return a tensor of "
        f"float numbers [KV heads, tokens] = {size} on {where}, got {got}."
    )

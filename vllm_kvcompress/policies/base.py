"""The interface of an eviction policy.

The life of one compaction is budgets -> score -> select. Budgets (how many tokens per layer
group) come from ``budgets.py``, because the scheduler must know them beforehand. A policy answers
one question: how much is each token worth. Forcing sinks, window and pins, top-k, rounding to
blocks and copying happen once, elsewhere.

A new policy is one file with one class, registered as an entry point of group
``vllm_kvcompress.policies``. The class is a frozen pydantic model: its fields are the parameters a
YAML file may set. The worker calls `score` once per layer and request, after the forward pass of
the step that ends the prompt; it must not keep state between calls and must not wait for the
device (no ``.item()``, ``.tolist()`` or ``.cpu()``).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from vllm_kvcompress.kernels.topk_select import select_tokens


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class ScoreInputs:
    """What a policy may look at: one request, one layer, this rank's KV heads.

    Attributes
    ----------
    keys : torch.Tensor
        [num_kv_heads, prompt_len, head_dim], the cache's dtype, after RoPE, in logical order.
    queries : torch.Tensor or None
        [num_heads, window, head_dim] after RoPE, of the last ``window`` prompt tokens; None
        unless the policy sets `needs_queries`.
    scale : float
        Softmax scale of the layer.
    num_sink_tokens : int
        First tokens that are kept anyway.
    layer_index : int
        Index of the layer in the model, from 0.
    seed : int
        Checksum of the prompt, equal on all ranks and in every run.
    all_reduce : callable
        Sums a tensor over the tensor-parallel ranks; the identity without tensor parallelism.
    num_ranks : int
        Ranks `all_reduce` sums over.
    first_kv_head : int
        Number of this rank's first KV head in the model.
    """

    keys: torch.Tensor
    queries: torch.Tensor | None
    scale: float
    num_sink_tokens: int
    layer_index: int
    seed: int
    all_reduce: Callable[[torch.Tensor], torch.Tensor] = _identity
    num_ranks: int = 1
    first_kv_head: int = 0

    def mean_over_heads(self, scores: torch.Tensor) -> torch.Tensor:
        """Average [num_kv_heads, n] over the KV heads of all ranks and give every head the mean."""
        mean = self.all_reduce(scores.mean(dim=0, keepdim=True)) / self.num_ranks
        return mean.expand_as(scores)


class Policy(BaseModel, ABC):
    """Base class of all policies. Fields of subclasses are their parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    needs_queries: ClassVar[bool] = False
    """Whether `score` wants the queries of the observation window."""

    @property
    def shares_scores(self) -> bool:
        """Whether the first layer of a layer group scores for all layers of it."""
        return False

    @abstractmethod
    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return [num_kv_heads, prompt_len] float32 scores, higher = keep."""

    def select(self, scores: torch.Tensor, forced: torch.Tensor, num_keep: int) -> torch.Tensor:
        """Return [num_kv_heads, num_keep] ascending positions among the scored ones.

        Parameters
        ----------
        scores : torch.Tensor
            [num_kv_heads, region_len] float32.
        forced : torch.Tensor
            [region_len] bool, positions that must be in the answer.
        num_keep : int
            Tokens to keep.
        """
        return select_tokens(scores, forced, num_keep)

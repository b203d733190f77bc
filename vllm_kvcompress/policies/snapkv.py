"""SnapKV: what the end of the prompt attends to."""

import torch

from vllm_kvcompress.policies.base import KernelSize, Policy
from vllm_kvcompress.policies.inputs import Queries, ScoreInputs
from vllm_kvcompress.policies.pooling import Pooling, pool_before_window


class SnapKV(Policy):
    """SnapKV: mean attention of the observation window, pooled over neighbours, per KV head.

    The pooling keeps neighbours of an important token. Scores of a group of query heads are
    averaged first, so that a KV head keeps one set of tokens. The question must be inside the
    window. (arXiv 2404.14469; window 64 and average over 5 as in NVIDIA/kvpress, the LongBench
    runner of KVCache-Factory uses window 8 and the maximum over 7)

    Attributes
    ----------
    kernel_size : int, default 5
        Width of the pooling, in tokens; odd.
    pooling : {"avg", "max"}, default "avg"
        Whether a token gets the mean or the best score of its neighbourhood.
    """

    kernel_size: KernelSize = 5
    pooling: Pooling = "avg"

    @property
    def queries(self) -> Queries:
        """Those of the observation window."""
        return Queries.WINDOW

    @property
    def latent_obstacle(self) -> str | None:
        """None: absorbed queries pay the attention of all heads."""
        return None

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return pooled attention. Pooling stops at the window, whose scores are not pooled in."""
        assert inputs.queries is not None
        window = inputs.queries.shape[1]
        scores = inputs.rows.attention(window)
        return pool_before_window(scores, window, self.kernel_size, self.pooling)

"""SnapKV: what the end of the prompt attends to."""

import torch
from pydantic import Field, field_validator
from torch.nn.functional import avg_pool1d

from vllm_kvcompress.kernels.window_attention import window_attention_scores
from vllm_kvcompress.policies.base import Policy, ScoreInputs


class SnapKV(Policy):
    """SnapKV: mean attention of the observation window, average-pooled, per KV head.

    The pooling keeps neighbours of an important token. Scores of a group of query heads are
    averaged, so that a KV head keeps one set of tokens. The question must be inside the window.
    (arXiv 2404.14469; window 64 and kernel 5 as in NVIDIA/kvpress, the authors' runner uses 8 and
    max-pooling over 7.)

    Attributes
    ----------
    kernel_size : int, default 5
        Width of the pooling, in tokens; odd.
    """

    needs_queries = True

    kernel_size: int = Field(default=5, ge=1)

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"must be odd, or the pooling is not centred, got {value}")
        return value

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return pooled attention. Pooling stops at the window, whose scores are not pooled in."""
        assert inputs.queries is not None
        scores = window_attention_scores(inputs.queries, inputs.keys, inputs.scale)
        past = scores[:, : scores.shape[1] - inputs.queries.shape[1]]
        pooled = avg_pool1d(past, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return torch.cat([pooled, scores[:, past.shape[1] :]], dim=1)

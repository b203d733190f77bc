"""LagKV: tokens that stand out against the block that follows."""

import torch
from pydantic import Field

from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ScoreInputs


class LagKV(Policy):
    """LagKV: rank tokens inside blocks by how keys and values compare with the next block's.

    After the sinks the cache is cut into blocks of `lag_size`. Each channel of a block is put on
    the scale that the next block's minimum and maximum make 0 and 1; a token's score is the
    standard deviation over its channels, softmax over the block, averaged over keys and values. A
    block keeps as many tokens as any other. The last full block and what follows it have nothing
    to be compared with and come first, most recent before others; so do sinks. A budget below
    ``n_sink + 2 * lag_size`` may have room for them alone: choose a smaller `lag_size` there.

    Needs no queries, so it also serves prompts whose question comes later. The paper compresses
    recursively, as tokens arrive; here, as in NVIDIA/kvpress, whose defaults these are, all blocks
    are ranked at once. (arXiv 2504.04704)

    Attributes
    ----------
    n_sink : int, default 4
        First tokens, outside the blocks.
    lag_size : int, default 128
        Tokens per block.
    cross_scoring : bool, default False
        Compare scores across blocks, instead of ranks inside blocks.
    """

    n_sink: int = Field(default=4, ge=0)
    lag_size: int = Field(default=128, ge=2)
    cross_scoring: bool = False

    @property
    def latent_obstacle(self) -> str | None:
        """Half of the contrast is that of values."""
        return "compares values"

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return ranks below 1 in compared blocks, (1, 2] by recency after them, 2 for sinks."""
        contrast = inputs.rows.lag_contrast(self.n_sink, self.lag_size)  # [KV, n]
        num_tokens = contrast.shape[1]
        num_sinks = min(self.n_sink, num_tokens)
        num_compared = max((num_tokens - num_sinks) // self.lag_size - 1, 0) * self.lag_size
        num_recent = num_tokens - num_sinks - num_compared
        age = torch.arange(num_recent - 1, -1, -1, dtype=torch.float32, device=contrast.device)
        scores = torch.full_like(contrast, 2.0)
        scores[:, num_tokens - num_recent :] -= age / max(num_recent, 1)
        if num_compared > 0:
            compared = slice(num_sinks, num_sinks + num_compared)
            blocks = contrast[:, compared].unflatten(1, (-1, self.lag_size))  # [KV, b, lag_size]
            if not self.cross_scoring:
                order = blocks.argsort(dim=-1, stable=True)
                blocks = order.argsort(dim=-1).float() / self.lag_size
            scores[:, compared] = blocks.flatten(1)
        return scores

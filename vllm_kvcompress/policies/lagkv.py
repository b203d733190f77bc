"""LagKV: tokens that stand out against the block that follows."""

import torch
from pydantic import Field

from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ScoreInputs

_SMALLEST_RANGE = 1e-6  # equal keys or values in a whole block would make it 0


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

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return ranks below 1 in compared blocks, (1, 2] by recency after them, 2 for sinks."""
        num_kv_heads, num_tokens, _ = inputs.keys.shape
        num_sinks = min(self.n_sink, num_tokens)
        num_compared = max((num_tokens - num_sinks) // self.lag_size - 1, 0) * self.lag_size
        num_recent = num_tokens - num_sinks - num_compared
        age = torch.arange(num_recent - 1, -1, -1, dtype=torch.float32, device=inputs.keys.device)
        scores = inputs.keys.new_full((num_kv_heads, num_tokens), 2.0, dtype=torch.float32)
        scores[:, num_tokens - num_recent :] -= age / max(num_recent, 1)
        if num_compared > 0:
            blocks = slice(num_sinks, num_sinks + num_compared + self.lag_size)
            for head in range(num_kv_heads):  # one at a time: float32 copies of one head only
                scores[head, num_sinks : num_sinks + num_compared] = self._compare(
                    inputs.keys[head, blocks], inputs.values[head, blocks]
                )
        return scores

    def _compare(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Scores [b * lag_size] of the first b of b + 1 blocks, from [(b + 1) * lag_size, D]."""
        scores = (self._contrast(keys) + self._contrast(values)) / 2  # [b, lag_size]
        if not self.cross_scoring:
            order = scores.argsort(dim=-1, stable=True)
            scores = order.argsort(dim=-1).float() / self.lag_size
        return scores.flatten()

    def _contrast(self, states: torch.Tensor) -> torch.Tensor:
        """Softmax over each block of how far its tokens' channels spread on the next's scale."""
        blocks = states.float().unflatten(0, (-1, self.lag_size))  # [b + 1, lag_size, D]
        lowest, highest = blocks[1:].amin(dim=1), blocks[1:].amax(dim=1)  # [b, D]
        span = (highest - lowest).clamp(min=_SMALLEST_RANGE)
        scaled = (blocks[:-1] - lowest[:, None]) / span[:, None]
        return scaled.std(dim=-1).softmax(dim=-1)

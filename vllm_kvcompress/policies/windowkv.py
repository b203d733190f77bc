"""WindowKV: neighbouring tokens live or die together."""

from typing import Literal

import torch
from pydantic import Field
from torch.nn.functional import pad

from vllm_kvcompress.kernels.window_attention import window_attention_scores
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import Queries, ScoreInputs


class WindowKV(Policy):
    """WindowKV: rank contiguous windows by the attention the end of the prompt pays them.

    One ranking serves all heads of a layer, and the first layer of a layer group ranks for the
    whole group. A window's score is the mean attention of its tokens, or of its better half. The
    paper's text takes the mean where the task is to find something ("localization") and the better
    half where it is to put things together ("aggregation"); its released code the other way round.
    The presets follow the text, through `tasks` of the configuration. Kept tokens are in position
    order. (arXiv 2503.17922, equation 4; p = half a window from the released code)

    Attributes
    ----------
    window_size : int, default 32
        Tokens per window (omega), counted from position 0.
    window_score : {"mean", "top_half"}, default "mean"
        What a window is worth.
    share_indices : bool, default True
        Let the first layer of a group rank for all its layers.
    """

    window_size: int = Field(default=32, ge=1)
    window_score: Literal["mean", "top_half"] = "mean"
    share_indices: bool = True

    @property
    def queries(self) -> Queries:
        """Those of the observation window."""
        return Queries.WINDOW

    @property
    def shares_scores(self) -> bool:
        """See `share_indices`."""
        return self.share_indices

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Give every token the score of its window."""
        assert inputs.queries is not None
        attention = window_attention_scores(inputs.queries, inputs.keys, inputs.scale)
        tokens = inputs.mean_over_heads(attention)[:1]  # [1, n]; one row, all heads agree
        num_review = tokens.shape[1] - inputs.queries.shape[1]
        windows = self._window_scores(tokens[0, :num_review])  # [number of windows]
        spread = windows.repeat_interleave(self.window_size)[:num_review]
        scores = torch.cat([spread, tokens[0, num_review:]])
        return scores.expand(attention.shape[0], -1)

    def _window_scores(self, tokens: torch.Tensor) -> torch.Tensor:
        """Score windows of [num_review] token scores; a short last window uses what it has."""
        size = self.window_size
        padding = -tokens.shape[0] % size
        grid = pad(tokens, (0, padding), value=float("-inf")).view(-1, size)
        best = size if self.window_score == "mean" else max(size // 2, 1)
        top = grid.sort(dim=-1, descending=True).values[:, :best]
        present = top.isfinite()
        return top.masked_fill(~present, 0).sum(dim=-1) / present.sum(dim=-1).clamp(min=1)

"""WindowKV: neighbouring tokens live or die together."""

from typing import Literal

import torch
from pydantic import Field
from torch.nn.functional import pad

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
    layers_per_leader : int or None, default None
        Let it rank for so many layers only, then the next one. Sharing needs no layer group then,
        which costs a block table in every step. None: for the whole layer group, as in the paper.
    """

    window_size: int = Field(default=32, ge=1)
    window_score: Literal["mean", "top_half"] = "mean"
    share_indices: bool = True
    layers_per_leader: int | None = Field(default=None, ge=1)

    @property
    def queries(self) -> Queries:
        """Those of the observation window."""
        return Queries.WINDOW

    @property
    def shares_scores(self) -> bool:
        """See `share_indices`."""
        return self.share_indices

    @property
    def layers_per_ranking(self) -> int | None:
        """See `layers_per_leader`."""
        return self.layers_per_leader

    @property
    def granularity(self) -> int:
        """A window, where all layers of a group share one ranking."""
        is_shared = self.share_indices and self.layers_per_leader is None
        return self.window_size if is_shared else 1

    @property
    def latent_obstacle(self) -> str | None:
        """None: absorbed queries pay the attention of all heads."""
        return None

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Give every token the score of its window."""
        assert inputs.queries is not None
        size, window = self.window_size, inputs.queries.shape[1]
        if self.window_score == "mean":
            windows = inputs.mean_over_heads(inputs.rows.window_attention(size))
        else:
            tokens = inputs.mean_over_heads(inputs.rows.attention(window))
            windows = self._best_half(tokens[:, : tokens.shape[1] - window])
        num_review = inputs.rows.num_tokens - window
        spread = windows.repeat_interleave(size, dim=1)[:, :num_review]
        # The observation window is kept anyway; no mean of attention is above 1.
        return pad(spread, (0, window), value=1.0)

    def _best_half(self, tokens: torch.Tensor) -> torch.Tensor:
        """Means of the better half of each window of [KV, num_review] token scores.

        A short last window uses what it has of as many.
        """
        size = self.window_size
        padded = pad(tokens, (0, -tokens.shape[1] % size), value=float("-inf"))
        grid = padded.unflatten(1, (padded.shape[1] // size, size))
        top = grid.topk(max(size // 2, 1), dim=-1).values
        present = top.isfinite()
        return top.masked_fill(~present, 0).sum(dim=-1) / present.sum(dim=-1).clamp(min=1)

"""CriticalKV: attention times how far the value can move the layer's output."""

import torch
from pydantic import Field

from vllm_kvcompress.kernels.compaction.tiers import best_tokens, two_tiers
from vllm_kvcompress.kernels.formulas.projected_norms import (
    PROJECTED_AT_ONCE,
    projected_value_norms,
)
from vllm_kvcompress.policies.inputs import ScoreInputs
from vllm_kvcompress.policies.layer_shape import LayerShape
from vllm_kvcompress.policies.wrapping import WrappingPolicy


class CriticalKV(WrappingPolicy):
    """CriticalKV: half of the budget by the scorer, the rest by score times ||W_o v||_1.

    W_o v is a token's value behind the layer's output projection, its norm averaged over the query
    heads of the KV head. Both stages choose per KV head. (arXiv 2502.03805; defaults as in
    NVIDIA/kvpress)

    Attributes
    ----------
    scorer : ScorerConfig, default snapkv
        The policy that scores tokens; its scores must not be negative, as attention is not, or a
        larger value would count against a token.
    first_stage_ratio : float, default 0.5
        Share of the budget that goes by the scorer alone, in [0, 1]; tokens that are kept anyway
        count.
    epsilon : float, default 1e-4
        Added to the score before it is multiplied, so that a large value counts without attention.
    """

    first_stage_ratio: float = Field(default=0.5, ge=0, le=1)
    epsilon: float = Field(default=1e-4, ge=0)

    @property
    def needs_output_projection(self) -> bool:
        """Always."""
        return True

    @property
    def latent_obstacle(self) -> str | None:
        """There is no value to project."""
        return "weighs values behind the output projection"

    def working_bytes(self, layer: LayerShape, num_tokens: int) -> int:
        """A copy of the values, the output projection, and the part that is projected at once."""
        projection = layer.num_heads * layer.head_dim * layer.hidden_size * layer.itemsize
        return (
            super().working_bytes(layer, num_tokens)
            + layer.copy_bytes * num_tokens
            + projection
            + 4 * PROJECTED_AT_ONCE
        )

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return ranks: tokens of the first stage first, then by score times norm."""
        assert inputs.output_projection is not None
        scores = self.inner.score(inputs)
        first = best_tokens(scores, inputs.forced, int(self.first_stage_ratio * inputs.num_keep))
        norms = projected_value_norms(inputs.values, inputs.output_projection)
        return two_tiers(first, scores, (scores + self.epsilon) * norms)

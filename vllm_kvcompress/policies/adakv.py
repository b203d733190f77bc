"""AdaKV, for caches whose heads all keep the same number of tokens."""

import torch
from pydantic import Field

from vllm_kvcompress.kernels.compaction.tiers import best_tokens, two_tiers
from vllm_kvcompress.policies.inputs import ScoreInputs
from vllm_kvcompress.policies.wrapping import WrappingPolicy


class AdaKV(WrappingPolicy):
    """AdaKV in uniform form: a safe share by the head's own scores, the rest by the layer's.

    This is not the paper's allocation. There, the heads of a layer compete for one pool of tokens
    and end up with caches of different lengths, none shorter than a safe share. Here every KV head
    of a layer keeps the same number, because they share a block table. What remains of the idea:
    each head is sure of its own best tokens, and the rest of its budget goes where the layer as a
    whole looks. Masking tokens without freeing them, as NVIDIA/kvpress does to imitate caches of
    different lengths, saves no memory and is not offered. (arXiv 2407.11550)

    Attributes
    ----------
    scorer : ScorerConfig, default snapkv
        The policy that scores tokens; its scores must be comparable between heads, as attention is.
    safeguard : float, default 0.2
        Share of the budget each head fills with its own best tokens, in (0, 1]; tokens that are
        kept anyway count. At 1 this is the scorer alone.
    """

    safeguard: float = Field(default=0.2, gt=0, le=1)

    @property
    def latent_obstacle(self) -> str | None:
        """There is one KV head."""
        return "shares a budget out between KV heads"

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return ranks: the head's safe tokens first, then by the mean over the layer's heads."""
        scores = self.inner.score(inputs)
        safe = best_tokens(scores, inputs.forced, int(self.safeguard * inputs.num_keep))
        return two_tiers(safe, scores, inputs.mean_over_heads(scores)[:1])

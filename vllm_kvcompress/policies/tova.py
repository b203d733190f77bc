"""TOVA: what the last token attends to."""

import torch

from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import Queries, ScoreInputs


class TOVA(Policy):
    """TOVA: attention of the last query, averaged over all heads: one token set per layer.

    The paper drops one token whenever one is generated; here a compaction drops many at once, by
    the same score. (arXiv 2401.06104, called TOVAPress in NVIDIA/kvpress)
    """

    @property
    def queries(self) -> Queries:
        """Those of the observation window, of which the last one is read."""
        return Queries.WINDOW

    @property
    def latent_obstacle(self) -> str | None:
        """None: absorbed queries pay the attention of all heads."""
        return None

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return the last token's attention, the same for all heads."""
        return inputs.mean_over_heads(inputs.rows.attention(num_queries=1))

"""CAKE: attention of the end of the prompt, and how much it changes from query to query."""

import torch
from pydantic import Field

from vllm_kvcompress.kernels.formulas.window_attention import window_attention
from vllm_kvcompress.policies.base import KernelSize, Policy
from vllm_kvcompress.policies.inputs import Queries, ScoreInputs
from vllm_kvcompress.policies.layer_shape import LayerShape
from vllm_kvcompress.policies.pooling import pool_before_window


class CAKE(Policy):
    """CAKE: mean plus gamma times variance of a token's attention over the observation window.

    A token that some queries need and others do not is worth more than its mean says. The sum is
    averaged over the query heads of a KV head and average-pooled over neighbours. This is the
    paper's choice of tokens; its choice of a budget per layer is a matter of `layer_budget`. The
    variance is the unbiased one of the authors' code. That code leaves out the variance when it
    compresses during decoding; here all compactions score alike. (arXiv 2503.12491)

    Attributes
    ----------
    gamma : float, default 200.0
        Weight of the variance.
    kernel_size : int, default 5
        Width of the pooling, in tokens; odd.
    """

    gamma: float = Field(default=200.0, ge=0)
    kernel_size: KernelSize = 5

    @property
    def queries(self) -> Queries:
        """Those of the observation window."""
        return Queries.WINDOW

    @property
    def latent_obstacle(self) -> str | None:
        """None: absorbed queries pay the attention of all heads."""
        return None

    def working_bytes(self, layer: LayerShape, num_tokens: int) -> int:
        """A copy of the keys; of one head at a time keys in float32, logits and attention."""
        one_head = layer.float_bytes + 2 * layer.logit_bytes
        return super().working_bytes(layer, num_tokens) + (layer.copy_bytes + one_head) * num_tokens

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return pooled indicators. Pooling stops at the window, whose scores are not pooled in."""
        assert inputs.queries is not None
        window = inputs.queries.shape[1]
        rows = []
        rows_of = window_attention(inputs.queries, inputs.keys, inputs.scale, inputs.rows.terms)
        for attention in rows_of:
            # A single query has no unbiased variance; its biased one is 0.
            variance = attention.var(dim=1, correction=min(window - 1, 1))
            indicator = attention.mean(dim=1) + self.gamma * variance  # [g, n]
            rows.append(indicator.mean(dim=0))
        return pool_before_window(torch.stack(rows), window, self.kernel_size, "avg")

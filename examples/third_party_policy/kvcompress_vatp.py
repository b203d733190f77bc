"""VATP: attention says who is looked at, the value says how much that changes."""

import torch
from pydantic import Field

from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import Queries, ScoreInputs


class VATP(Policy):
    """VATP: attention of the observation window times the length of the value, per KV head.

    A token's share of an attention output is its attention times its value, so a token that is
    looked at but carries a short value can go. The paper takes the attention of all earlier
    queries (H2O) or of recent ones (Scissorhands); here it is the observation window's. Sinks,
    whose values are short, are kept by vllm-kvcompress as the paper keeps them. (arXiv 2406.12335)

    Attributes
    ----------
    norm_power : float, default 1.0
        Exponent of the value's L1 norm; 1 is the paper's, 0 leaves the attention alone.
    """

    norm_power: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @property
    def queries(self) -> Queries:
        """Those of the observation window."""
        return Queries.WINDOW

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return attention times ||v||_1 ** norm_power, [num_kv_heads, n] float32."""
        assert inputs.queries is not None
        attention = inputs.rows.attention(num_queries=inputs.queries.shape[1])
        norms = inputs.values.float().abs().sum(dim=-1)  # [num_kv_heads, n]
        return attention * norms**self.norm_power

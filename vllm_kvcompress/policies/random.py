"""Random eviction, the control."""

import torch
from pydantic import Field

from vllm_kvcompress.kernels.host_copy import to_device
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ScoreInputs


class Random(Policy):
    """Random: every token is worth a random number, drawn per KV head.

    Attributes
    ----------
    seed : int, default 0
        Mixed with a checksum of the prompt, the layer's and the head's number, so that a prompt
        always loses the same tokens, after a preemption and under tensor parallelism too.
    """

    seed: int = Field(default=0, ge=0)

    @property
    def latent_obstacle(self) -> str | None:
        """None: tokens are drawn, not looked at."""
        return None

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return uniform random scores, drawn on the CPU so that all devices agree."""
        num_kv_heads, num_tokens = inputs.rows.num_kv_heads, inputs.rows.num_tokens
        scores = torch.empty(num_kv_heads, num_tokens)
        for head in range(num_kv_heads):
            place = (inputs.layer_index, inputs.first_kv_head + head)
            mixed = hash((self.seed, inputs.seed, *place)) & (2**63 - 1)
            torch.rand(num_tokens, generator=torch.Generator().manual_seed(mixed), out=scores[head])
        return to_device(scores.numpy(), scores.dtype, inputs.rows.device)

"""Random eviction, the control."""

import torch
from pydantic import Field

from vllm_kvcompress.policies.base import Policy, ScoreInputs


class Random(Policy):
    """Random: every token is worth a random number, drawn per KV head.

    Attributes
    ----------
    seed : int, default 0
        Mixed with a checksum of the prompt and the layer's index, so that a prompt always loses
        the same tokens, also after a preemption.
    """

    seed: int = Field(default=0, ge=0)

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return uniform random scores, drawn on the CPU so that all devices agree."""
        num_kv_heads, num_tokens, _ = inputs.keys.shape
        mixed = hash((self.seed, inputs.seed, inputs.layer_index)) & (2**63 - 1)
        generator = torch.Generator().manual_seed(mixed)
        scores = torch.rand(num_kv_heads, num_tokens, generator=generator)
        return scores.to(inputs.keys.device, non_blocking=True)

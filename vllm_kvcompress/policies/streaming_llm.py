"""StreamingLLM: attention sinks and the most recent tokens."""

import torch

from vllm_kvcompress.policies.base import Policy, ScoreInputs


class StreamingLLM(Policy):
    """StreamingLLM: keep the first tokens and the most recent ones.

    The sinks are `num_sink_tokens` of the configuration. Positions are kept; the paper renumbers
    them, which matters past the model's trained length. (arXiv 2309.17453)
    """

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Later tokens score higher; the caller forces the sinks."""
        num_kv_heads, num_tokens, _ = inputs.keys.shape
        positions = torch.arange(num_tokens, dtype=torch.float32, device=inputs.keys.device)
        return positions.expand(num_kv_heads, -1)

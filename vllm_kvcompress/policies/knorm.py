"""Knorm: keep the shortest keys."""

import torch

from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ScoreInputs
from vllm_kvcompress.policies.layer_shape import LayerShape


class Knorm(Policy):
    """Knorm: score = -||key||_2, per KV head.

    Short keys tend to get much attention, so no queries are needed. Every layer is compressed
    alike; the authors' examples leave the first two whole. (arXiv 2406.11430)
    """

    @property
    def latent_obstacle(self) -> str | None:
        """None: a row of the cache is a key."""
        return None

    def working_bytes(self, layer: LayerShape, num_tokens: int) -> int:
        """A copy of the keys."""
        return super().working_bytes(layer, num_tokens) + layer.copy_bytes * num_tokens

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return minus the length of each key; in float32, or bfloat16 would tie most of them."""
        return -torch.linalg.vector_norm(inputs.keys, dim=-1, dtype=torch.float32)

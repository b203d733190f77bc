"""KeyDiff: keep the keys that look least like the average key."""

import torch

from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ScoreInputs


class KeyDiff(Policy):
    """KeyDiff: score = -cos(key, mean of the unit keys), per KV head.

    Needs no queries, so it also serves prompts whose question comes later. The paper applies it
    block by block during prefill; here it sees the whole prompt once. (arXiv 2504.15364)
    """

    @property
    def latent_obstacle(self) -> str | None:
        """None: a row of the cache is a key."""
        return None

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return minus the cosine between each key and the head's anchor."""
        return -inputs.rows.key_similarity()

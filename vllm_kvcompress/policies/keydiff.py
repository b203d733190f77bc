"""KeyDiff: keep the keys that look least like the average key."""

import torch
from torch.nn.functional import cosine_similarity, normalize

from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ScoreInputs


class KeyDiff(Policy):
    """KeyDiff: score = -cos(key, mean of the unit keys), per KV head.

    Needs no queries, so it also serves prompts whose question comes later. The paper applies it
    block by block during prefill; here it sees the whole prompt once. (arXiv 2504.15364)
    """

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return minus the cosine between each key and the head's anchor."""
        keys = inputs.keys.float()
        anchor = normalize(keys, p=2, dim=-1).mean(dim=1, keepdim=True)
        return -cosine_similarity(keys, anchor, dim=-1)

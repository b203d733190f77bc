"""How alike a key is to the others: its cosine with the mean unit key (KeyDiff, 2504.15364)."""

import torch
from torch.nn.functional import cosine_similarity, normalize

UNIT_EPS = 1e-12
"""Smallest norm that keys are divided by for the anchor (`torch.nn.functional.normalize`)."""

COSINE_EPS = 1e-8
"""Smallest norm of either side of a cosine (`torch.nn.functional.cosine_similarity`)."""


def key_similarity(keys: torch.Tensor) -> torch.Tensor:
    """[KV, n] float32 in [-1, 1], from keys [KV, n, D] of any float dtype."""
    keys = keys.float()
    anchor = normalize(keys, dim=-1, eps=UNIT_EPS).mean(dim=1, keepdim=True)
    return cosine_similarity(keys, anchor, dim=-1, eps=COSINE_EPS)

"""CriticalKV against sets of tokens built by hand."""

import numpy as np
import pytest
import torch

from tests.policies.helpers import attention_by_loops, best_first, make_inputs, select
from vllm_kvcompress.policies.criticalkv import CriticalKV
from vllm_kvcompress.policies.inputs import ScoreInputs

ATTENTION = {"name": "snapkv", "kernel_size": 1}


def norms_by_loops(given: ScoreInputs) -> np.ndarray:
    """[KV, n]: L1 norm of W_o v, averaged over the query heads of a KV head."""
    assert given.output_projection is not None
    values, weights = given.values.double().numpy(), given.output_projection.double().numpy()
    group = len(weights) // len(values)
    norms = np.zeros(values.shape[:2])
    for head, weight in enumerate(weights):
        for token, value in enumerate(values[head // group]):
            norms[head // group, token] += np.abs(weight @ value).sum() / group
    return norms


@pytest.mark.parametrize("first_stage_ratio", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("epsilon", [0.0, 1e-4, 10.0])
def test_two_stages(first_stage_ratio: float, epsilon: float) -> None:
    given = make_inputs()
    tokens = attention_by_loops(given).mean(axis=1).reshape(2, 4, 150).mean(axis=1)
    weighted = (tokens + epsilon) * norms_by_loops(given)
    expected = []
    for head in range(2):
        kept = set(torch.where(given.forced)[0].tolist())
        for token in best_first(tokens[head]):
            if len(kept) < int(first_stage_ratio * 64):
                kept.add(token)
        for token in best_first(weighted[head]):
            if len(kept) < 64:
                kept.add(token)
        expected.append(kept)
    policy = CriticalKV(first_stage_ratio=first_stage_ratio, epsilon=epsilon, scorer=ATTENTION)
    kept = select(policy.score(given), given.forced, 64)
    assert [set(row) for row in kept.tolist()] == expected


def test_a_large_value_survives_little_attention() -> None:
    given = make_inputs()
    values = given.values.clone()
    worst = CriticalKV().inner.score(given)[:, 4:130].argmin(dim=1) + 4
    values[[0, 1], worst] *= 1000
    policy = CriticalKV()
    kept = select(policy.score(make_inputs(values=values)), given.forced, 64)
    assert all(token in row for token, row in zip(worst.tolist(), kept.tolist(), strict=True))


def test_needs_the_output_projection() -> None:
    policy = CriticalKV(scorer={"name": "keydiff"})
    assert policy.needs_output_projection
    with pytest.raises(AssertionError):
        policy.score(make_inputs(output_projection=None))

"""Random numbers that repeat where they must and differ where they must."""

import torch

from tests.policies.helpers import changed, make_inputs
from vllm_kvcompress.policies.random import Random


def test_random_draws_per_head_layer_and_prompt() -> None:
    policy, given = Random(), make_inputs()
    scores = policy.score(given)
    assert not torch.equal(scores[0], scores[1])
    for change in ({"layer_index": 2}, {"seed": 100}):
        assert not torch.equal(policy.score(changed(given, **change)), scores)
    assert not torch.equal(Random(seed=1).score(given), scores)
    second_rank = changed(given, keys=given.keys[1:], first_kv_head=1)
    assert torch.equal(policy.score(second_rank), scores[1:])

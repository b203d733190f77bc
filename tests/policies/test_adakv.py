"""AdaKV in uniform form against sets of tokens built by hand."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.policies.helpers import attention_by_loops, best_first, make_inputs, select
from vllm_kvcompress.policies.adakv import AdaKV
from vllm_kvcompress.policies.inputs import Queries

ATTENTION = {"name": "snapkv", "kernel_size": 1}


def kept_by_hand(
    tokens: np.ndarray, forced: set[int], num_keep: int, safeguard: float
) -> list[set[int]]:
    """Fill each head's budget: forced tokens, its own best, then the layer's best."""
    heads = []
    for head in range(len(tokens)):
        kept = set(forced)
        for token in best_first(tokens[head]):
            if len(kept) < int(safeguard * num_keep):
                kept.add(token)
        for token in best_first(tokens.mean(axis=0)):
            if len(kept) < num_keep:
                kept.add(token)
        heads.append(kept)
    return heads


@pytest.mark.parametrize("safeguard", [0.01, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("num_keep", [24, 64, 149])
def test_own_best_first_then_the_layers(safeguard: float, num_keep: int) -> None:
    given = make_inputs(num_keep=num_keep)
    tokens = attention_by_loops(given).mean(axis=1).reshape(2, 4, 150).mean(axis=1)
    forced = set(torch.where(given.forced)[0].tolist())
    expected = kept_by_hand(tokens, forced, num_keep, safeguard)
    policy = AdaKV(safeguard=safeguard, scorer=ATTENTION)
    kept = select(policy.score(given), given.forced, num_keep)
    assert [set(row) for row in kept.tolist()] == expected


def test_without_forced_tokens_a_head_is_sure_of_its_share() -> None:
    given = make_inputs(forced=torch.zeros(150, dtype=torch.bool))
    policy = AdaKV(safeguard=0.5, scorer={"name": "knorm"})
    kept = select(policy.score(given), given.forced, 64).tolist()
    own = policy.inner.score(given).topk(32).indices.tolist()
    assert all(set(best) <= set(row) for best, row in zip(own, kept, strict=True))
    assert len(set(kept[0]) & set(kept[1])) < 64, "heads differ"


def test_a_full_safeguard_is_the_scorer_alone() -> None:
    given = make_inputs()
    policy = AdaKV(safeguard=1.0)
    expected = select(policy.inner.score(given), given.forced, 64)
    assert torch.equal(select(policy.score(given), given.forced, 64), expected)


def test_reads_what_its_scorer_reads() -> None:
    assert AdaKV().queries is Queries.WINDOW
    assert AdaKV(scorer={"name": "keydiff"}).queries is Queries.NONE


@pytest.mark.parametrize("safeguard", [0, -0.1, 1.1])
def test_refuses_shares_outside_0_to_1(safeguard: float) -> None:
    with pytest.raises(ValidationError, match="safeguard"):
        AdaKV(safeguard=safeguard)

"""TOVA against loops in float64."""

import numpy as np
import pytest
import torch

from tests.policies.helpers import attention_by_loops, make_inputs
from vllm_kvcompress.policies.tova import TOVA


@pytest.mark.parametrize("num_tokens", [17, 150])
def test_is_the_last_querys_attention_averaged_over_all_heads(num_tokens: int) -> None:
    given = make_inputs(num_tokens)
    expected = attention_by_loops(given)[:, -1].mean(axis=0)
    found = TOVA().score(given)
    assert torch.equal(found[0], found[1]), "one choice for all heads"
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-4, atol=1e-8)


def test_the_window_before_the_last_token_does_not_matter() -> None:
    given = make_inputs()
    assert given.queries is not None
    torch.testing.assert_close(
        TOVA().score(make_inputs(queries=given.queries[:, -1:])), TOVA().score(given)
    )


def test_two_ranks_choose_as_one() -> None:
    given = make_inputs()
    assert given.queries is not None
    parts = [{"keys": given.keys[r : r + 1], "queries": given.queries[4 * r :][:4]} for r in (0, 1)]
    whole = TOVA().score(given)
    total = sum(TOVA().score(make_inputs(**part))[:1] for part in parts)
    for part in parts:
        found = TOVA().score(make_inputs(**part, num_ranks=2, all_reduce=lambda _: total))
        torch.testing.assert_close(found, whole[:1])

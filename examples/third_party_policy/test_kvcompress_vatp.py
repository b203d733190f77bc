"""Run with: pytest examples/third_party_policy"""

import pytest
import torch
from kvcompress_vatp import VATP
from pydantic import ValidationError

from vllm_kvcompress.kernels.cache.rows import DenseRows
from vllm_kvcompress.policies.inputs import ScoreInputs

NUM_TOKENS, WINDOW, HEAD_DIM = 50, 8, 16


def make_inputs() -> ScoreInputs:
    """2 KV heads, 4 query heads, random tensors."""
    generator = torch.Generator().manual_seed(0)
    forced = torch.zeros(NUM_TOKENS, dtype=torch.bool)
    forced[-WINDOW:] = True
    return ScoreInputs(
        rows=DenseRows(
            keys=torch.randn(2, NUM_TOKENS, HEAD_DIM, generator=generator),
            values=torch.randn(2, NUM_TOKENS, HEAD_DIM, generator=generator),
            queries=torch.randn(4, WINDOW, HEAD_DIM, generator=generator),
            scale=HEAD_DIM**-0.5,
        ),
        accumulated=None,
        position=NUM_TOKENS,
        num_keep=20,
        forced=forced,
        num_sink_tokens=0,
        layer_index=0,
        seed=0,
    )


def test_scores_are_attention_times_the_value_norm() -> None:
    given = make_inputs()
    expected = torch.zeros(2, NUM_TOKENS)
    for head in range(4):
        for row in range(WINDOW):
            seen = NUM_TOKENS - WINDOW + row + 1
            logits = given.keys[head // 2, :seen] @ given.queries[head, row] * given.scale
            expected[head // 2, :seen] += logits.softmax(dim=0) / (2 * WINDOW)
    expected *= given.values.norm(p=1, dim=-1)
    torch.testing.assert_close(VATP().score(given), expected)


def test_a_longer_value_wins_and_power_0_ignores_it() -> None:
    given = make_inputs()
    before = VATP(norm_power=0).score(given), VATP().score(given)
    given.values[:, 7] *= 10
    after = VATP(norm_power=0).score(given), VATP().score(given)
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1][:, 7], 10 * before[1][:, 7])


def test_parameters_are_checked() -> None:
    for wrong in ({"norm_power": -1}, {"norm_power": "big"}, {"power": 1}):
        with pytest.raises(ValidationError):
            VATP(**wrong)

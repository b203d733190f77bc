"""Policies over layers with a soft cap and learned sinks, against loops in float64."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.policies.helpers import make_inputs
from vllm_kvcompress.kernels.formulas.softmax_terms import SoftmaxTerms
from vllm_kvcompress.policies.cake import CAKE
from vllm_kvcompress.policies.h2o import H2O
from vllm_kvcompress.policies.inputs import ChunkInputs, ScoreInputs
from vllm_kvcompress.policies.rkv import RKV
from vllm_kvcompress.policies.snapkv import SnapKV
from vllm_kvcompress.policies.spindlekv import SpindleKV

SINKS = [2.0, -1.0, 0.5, 5.0, 1.0, -20.0, 3.0, 0.0]
TERMS = {
    "cap": SoftmaxTerms(1.5),
    "sinks": SoftmaxTerms(sinks=torch.tensor(SINKS)),
    "both": SoftmaxTerms(0.8, torch.tensor(SINKS)),
}
CASES = pytest.mark.parametrize("terms", TERMS.values(), ids=list(TERMS))
WINDOW, LENGTH = 4, 30


def rows(inputs: ScoreInputs, terms: SoftmaxTerms) -> Iterator[tuple[int, int, np.ndarray]]:
    """(head, query, capped logits of the keys it sees) in float64."""
    assert inputs.queries is not None
    for head in range(8):
        for i in range(WINDOW):
            query = inputs.queries[head, i].double().numpy()
            keys = inputs.keys[head // 4, : LENGTH - WINDOW + i + 1].double().numpy()
            logits = keys @ query * inputs.scale
            cap = terms.soft_cap
            yield head, i, cap * np.tanh(logits / cap) if cap else logits


def attention(inputs: ScoreInputs, terms: SoftmaxTerms) -> np.ndarray:
    """[H, w, n]."""
    found = np.zeros((8, WINDOW, LENGTH))
    for head, i, logits in rows(inputs, terms):
        sink = 0.0 if terms.sinks is None else np.exp(SINKS[head])
        found[head, i, : len(logits)] = np.exp(logits) / (np.exp(logits).sum() + sink)
    return found


@pytest.fixture(params=list(TERMS))
def terms(request: pytest.FixtureRequest) -> SoftmaxTerms:
    return TERMS[request.param]


@pytest.fixture
def inputs(terms: SoftmaxTerms) -> ScoreInputs:
    return make_inputs(LENGTH, WINDOW, terms=terms)


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-7)


def test_snapkv(inputs: ScoreInputs, terms: SoftmaxTerms) -> None:
    expected = attention(inputs, terms).reshape(2, 4, WINDOW, LENGTH).mean((1, 2))
    past = LENGTH - WINDOW
    close(SnapKV(kernel_size=1).score(inputs)[:, :past], expected[:, :past])


def test_cake(inputs: ScoreInputs, terms: SoftmaxTerms) -> None:
    exact = attention(inputs, terms).reshape(2, 4, WINDOW, LENGTH)
    expected = (exact.mean(2) + 200 * exact.var(2, ddof=1)).mean(1)
    past = LENGTH - WINDOW
    close(CAKE(kernel_size=1).score(inputs)[:, :past], expected[:, :past])


def test_rkv_takes_the_strongest_sink_like_the_strongest_logit(
    inputs: ScoreInputs, terms: SoftmaxTerms
) -> None:
    past = LENGTH - WINDOW
    strongest = np.full((2, WINDOW, past), -np.inf)
    for head, i, logits in rows(inputs, terms):
        strongest[head // 4, i] = np.maximum(strongest[head // 4, i], logits[:past])
    weights = np.exp(strongest)
    sinks = np.zeros(2) if terms.sinks is None else np.exp([max(SINKS[:4]), max(SINKS[4:])])
    expected = (weights / (weights.sum(-1, keepdims=True) + sinks[:, None, None])).mean(1)
    policy = RKV(kernel_size=1, importance_weight=1.0)
    close(policy.score(inputs)[:, :past], expected)


def test_heads_alone_and_whole_prompts(inputs: ScoreInputs, terms: SoftmaxTerms) -> None:
    exact = attention(inputs, terms)
    close(inputs.rows.head_attention(WINDOW), exact.mean(1))
    close(inputs.rows.attention_sums(), exact.reshape(2, 4, WINDOW, LENGTH).mean(1).sum(1))
    plain = make_inputs(LENGTH, WINDOW)
    for policy in (SpindleKV(), SnapKV()):
        assert not torch.equal(policy.score(inputs), policy.score(plain))
    chunks = [ChunkInputs(each.rows, LENGTH - WINDOW, LENGTH, 4) for each in (inputs, plain)]
    ours, theirs = (H2O().accumulate(None, chunk) for chunk in chunks)
    assert not torch.equal(ours, theirs)

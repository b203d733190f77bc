"""Soft caps and learned sinks where codes are read: both versions against loops in float64."""

import math

import numpy as np
import pytest
import torch

from tests.kernels.codebook.test_attention import (
    VERSIONS,
    frequencies,
    make_queries,
    random_book,
    reconstructed,
)
from tests.kernels.codebook.test_tail import random_tail
from tests.kernels.paged import DEVICE, nan_empty
from vllm_kvcompress.kernels.formulas.softmax_terms import SoftmaxTerms

SINKS = [2.0, -1.0, 7.0, -25.0]
CASES = pytest.mark.parametrize(
    ("cap", "sinks"), [(3.0, None), (0.0, SINKS), (1.5, SINKS)], ids=["cap", "sinks", "both"]
)


@pytest.fixture(autouse=True)
def _poison(monkeypatch) -> None:
    nan_empty(monkeypatch)


def attend(query, keys, values, scale, cap, sink) -> tuple[np.ndarray, float]:
    """Output [D] and logarithm of the denominator, token by token."""
    logits = [float(key @ query) * scale for key in keys]
    if cap:
        logits = [cap * math.tanh(each / cap) for each in logits]
    top = max([*logits, *([] if sink is None else [sink])])
    weights = [math.exp(each - top) for each in logits]
    total = sum(weights) + (0.0 if sink is None else math.exp(sink - top))
    out = sum(weight * value for weight, value in zip(weights, values, strict=True)) / total
    return out, math.log(total) + top


@VERSIONS
@CASES
@pytest.mark.parametrize("with_tail", [False, True])
def test_codes_and_tails_against_loops(module, cap: float, sinks, with_tail: bool) -> None:
    lengths, inv_freq = [70, 33], frequencies(32)
    book, exact = random_book(lengths, 2, 32)
    queries = make_queries(2, 4, 32)
    tail = tail_rows = None
    if with_tail:
        tail, tail_rows = random_tail([9, 40], [3, 16])
    # Of the weights' type, as a layer holds them.
    held = None if sinks is None else torch.tensor(sinks, dtype=torch.bfloat16).to(DEVICE)
    terms = SoftmaxTerms(cap, held)
    out, lse = module.codebook_attention(queries, book, inv_freq, True, 0.3, tail, terms)
    for request in range(2):
        for head in range(4):
            keys, values = reconstructed(exact[request], head // 2, inv_freq, True)
            if tail_rows is not None:
                more = [rows[head // 2].numpy() for rows in tail_rows[request]]
                keys, values = np.concatenate([keys, more[0]]), np.concatenate([values, more[1]])
            query = queries[request, head].double().cpu().numpy()
            sink = None if sinks is None else sinks[head]
            wanted, wanted_lse = attend(query, keys, values, 0.3, cap, sink)
            found = out[request, head].double().cpu().numpy()
            np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=5e-5)
            assert abs(float(lse[request, head]) - wanted_lse) < 5e-5


@VERSIONS
def test_a_request_without_tokens_sees_the_sinks_alone(module) -> None:
    book, _ = random_book([0, 5], 2, 32)
    terms = SoftmaxTerms(sinks=torch.tensor(SINKS, device=DEVICE))
    queries = make_queries(2, 4, 32)
    out, lse = module.codebook_attention(queries, book, frequencies(32), True, 0.3, None, terms)
    assert (out[0] == 0).all()
    torch.testing.assert_close(lse[0].cpu(), torch.tensor(SINKS))

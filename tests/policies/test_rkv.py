"""R-KV against loops in float64."""

import numpy as np
import pytest
import torch

from tests.policies.helpers import best_first, make_inputs
from vllm_kvcompress.policies.inputs import ScoreInputs
from vllm_kvcompress.policies.rkv import RKV


def importance_by_loops(given: ScoreInputs, kernel_size: int) -> np.ndarray:
    assert given.queries is not None
    queries, keys = given.queries.double().numpy(), given.keys.double().numpy()
    (num_kv_heads, num_tokens, _), window = keys.shape, queries.shape[1]
    group, past, half = len(queries) // num_kv_heads, num_tokens - window, kernel_size // 2
    importance = np.zeros((num_kv_heads, num_tokens))
    for kv in range(num_kv_heads):
        mean = np.zeros(past)
        for i in range(window):
            logits = np.full(past, -np.inf)
            for head in range(kv * group, (kv + 1) * group):
                for token in range(past):
                    logit = queries[head, i] @ keys[kv, token] * given.scale
                    logits[token] = max(logits[token], logit)
            exponents = np.exp(logits - logits.max())
            mean += exponents / exponents.sum() / window
        for token in range(past):
            importance[kv, token] = mean[max(token - half, 0) : token + half + 1].max()
    return importance


def redundancy_by_loops(given: ScoreInputs, threshold: float) -> np.ndarray:
    redundancy = np.zeros(given.keys.shape[:2])
    for kv, keys in enumerate(given.keys.double().numpy()):
        num_tokens = len(keys)
        sums = np.zeros(num_tokens)
        for i in range(num_tokens):
            cosines = np.zeros(num_tokens)
            exempt = 0
            for j in range(num_tokens):
                if j != i:
                    lengths = np.linalg.norm(keys[i]) * np.linalg.norm(keys[j])
                    cosines[j] = keys[i] @ keys[j] / lengths
                    if cosines[j] > threshold:
                        exempt = j
            cosines[exempt] = 0
            sums += cosines
        exponents = np.exp(sums / num_tokens)
        redundancy[kv] = exponents / exponents.sum()
    return redundancy


@pytest.mark.parametrize("weight", [0.0, 0.07, 1.0])
@pytest.mark.parametrize("threshold", [0.1, 0.5])
@pytest.mark.parametrize(("num_tokens", "kernel_size"), [(9, 7), (60, 1), (100, 7)])
def test_is_importance_against_redundancy(
    weight: float, threshold: float, num_tokens: int, kernel_size: int
) -> None:
    given = make_inputs(num_tokens, window=8)
    expected = weight * importance_by_loops(given, kernel_size)
    expected -= (1 - weight) * redundancy_by_loops(given, threshold)
    policy = RKV(importance_weight=weight, similarity_threshold=threshold, kernel_size=kernel_size)
    found = policy.score(given)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-8)


def test_of_repeated_keys_the_latest_is_worth_most() -> None:
    given = make_inputs(100, window=8)
    keys = given.keys.clone()
    repeated = list(range(10, 90, 5))
    keys[:, repeated] = keys[:, 10:11]
    queries = torch.zeros(8, 8, 32)  # no query prefers any key
    scores = RKV().score(make_inputs(100, window=8, keys=keys, queries=queries))
    for row in scores.numpy():
        # The last is the latest neighbour of all others, and the one before it that of the last.
        assert best_first(row[repeated])[:2] == [15, 14]
        assert set(best_first(row[:92])[-14:]) == set(repeated[:14])


def test_a_long_cache_is_scored_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    given = make_inputs(100, window=8)
    whole = RKV().score(given)
    monkeypatch.setattr("vllm_kvcompress.kernels.formulas.key_redundancy._ELEMENTS", 1400)
    torch.testing.assert_close(RKV().score(given), whole)

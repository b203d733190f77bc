"""CAKE's layer preference against loops in float64."""

import numpy as np
import pytest

from tests.policies.helpers import attention_by_loops, make_inputs
from vllm_kvcompress.kernels.formulas.layer_preference import layer_preference


@pytest.mark.parametrize(("tau1", "tau2"), [(1.0, 1.0), (1.6, 0.4)])
def test_entropy_times_variance(tau1: float, tau2: float) -> None:
    given = make_inputs()
    attention = attention_by_loops(given)  # [H, w, n]
    entropies, variances = [], []
    for head in attention:
        for row in head:
            entropies.append(-sum(p * np.log(p) for p in row if p > 0))
        mean = head.mean(axis=0)
        variances.append((((head - mean) ** 2).sum(axis=0) / (len(head) - 1)).sum())
    expected = np.mean(entropies) ** (1 / tau1) * np.mean(variances) ** (1 / tau2)
    found = layer_preference(given.queries, given.keys, given.scale, tau1, tau2)
    assert float(found) == pytest.approx(expected, rel=1e-4)

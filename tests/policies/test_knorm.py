"""Knorm against loops in float64."""

import math

import numpy as np
import torch

from tests.policies.helpers import make_inputs
from vllm_kvcompress.policies.knorm import Knorm


def test_is_minus_the_length_of_the_key() -> None:
    given = make_inputs()
    expected = [
        [-math.sqrt(sum(x * x for x in key)) for key in head] for head in given.keys.tolist()
    ]
    np.testing.assert_allclose(Knorm().score(given).numpy(), expected, rtol=1e-6)


def test_bfloat16_keys_do_not_tie() -> None:
    keys = make_inputs(num_tokens=2000).keys.bfloat16()
    scores = Knorm().score(make_inputs(num_tokens=2000, keys=keys))
    assert scores.dtype == torch.float32
    assert scores[0].unique().numel() > 1900

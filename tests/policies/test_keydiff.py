"""KeyDiff against its formula in float64."""

import numpy as np

from tests.policies.helpers import make_inputs
from vllm_kvcompress.policies.keydiff import KeyDiff


def test_keydiff_is_minus_the_cosine_with_the_mean_unit_key() -> None:
    given = make_inputs()
    keys = given.keys.double().numpy()
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    anchor = unit.mean(axis=1, keepdims=True)
    cosine = (keys * anchor).sum(-1) / (
        np.linalg.norm(keys, axis=-1) * np.linalg.norm(anchor, axis=-1)
    )
    found = KeyDiff().score(given)
    np.testing.assert_allclose(found.numpy(), -cosine, rtol=1e-4, atol=1e-6)

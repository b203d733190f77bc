"""Which layers attend to everything, by what configurations say."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_kvcompress.lengths.layer_kinds import PATTERNS, full_layers, layer_types

SLIDING, FULL = "sliding_attention", "full_attention"


def layers(max_len: int | None = None, **fields: Any) -> tuple[int, ...]:
    return full_layers(SimpleNamespace(num_hidden_layers=6, **fields), max_len)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"sliding_window": None}, (0, 1, 2, 3, 4, 5)),
        ({"sliding_window": 512}, ()),
        ({"sliding_window": 512, "use_sliding_window": False}, (0, 1, 2, 3, 4, 5)),
        ({"sliding_window": 512, "layer_types": [SLIDING, FULL] * 3}, (1, 3, 5)),
        ({"sliding_window": 512, "sliding_window_pattern": 3}, (2, 5)),
        ({"sliding_window": 512, "_sliding_window_pattern": 6}, (5,)),
        ({"sliding_window": 512, "sliding_window_pattern": 1}, (0, 1, 2, 3, 4, 5)),
        ({"sliding_window": 512, "sliding_window_pattern": 0, "model_type": "gemma2"}, (1, 3, 5)),
        ({"sliding_window_pattern": 3}, (0, 1, 2, 3, 4, 5)),
        ({"layer_types": ["linear_attention", FULL] * 3}, (1, 3, 5)),
        ({"layer_types": [FULL] * 6, "sliding_window": 512}, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_full_layers(fields: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert layers(**fields) == expected


@pytest.mark.parametrize(("max_len", "count"), [(511, 6), (512, 6), (513, 0), (None, 0)])
def test_a_window_that_no_sequence_outgrows_is_none(max_len: int | None, count: int) -> None:
    assert len(layers(max_len, sliding_window=512)) == count


def test_a_window_that_is_switched_off_is_none() -> None:
    """--disable-sliding-window takes the window away and leaves the words."""
    assert layers(layer_types=[SLIDING, FULL] * 3, sliding_window=None) == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("model_type", PATTERNS)
@pytest.mark.parametrize("count", [6, 7, 12, 13])
def test_patterns_are_the_defaults_of_transformers(model_type: str, count: int) -> None:
    """Of files that say nothing, as those of Gemma 2 and 3 do."""
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    fields = {"num_hidden_layers": count, "sliding_window": 64}
    known = auto.CONFIG_MAPPING[model_type](**fields)
    found = layer_types(SimpleNamespace(**fields, model_type=model_type))
    assert found == tuple(known.layer_types) == layer_types(known)
    assert {SLIDING, FULL} == set(found)

"""Words of configurations that have recurrent layers beside attention."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_kvcompress.lengths.layer_kinds import SERVED, full_layers, layer_types
from vllm_kvcompress.lengths.layer_words import (
    FULL,
    NO_CACHE,
    STATE,
    named_layers,
    turns_no_keys,
)


def text(**fields: Any) -> Any:
    return SimpleNamespace(**{"num_hidden_layers": 4, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_types": ["linear_attention", FULL] * 2},  # Qwen3-Next, and all of transformers 5
        {"layer_types": ["mamba", "attention"] * 2},  # Granite 4, as on disk
        {"layers_block_type": ["mamba", "attention"] * 2},  # Jamba
        {"layer_types": ["conv", FULL] * 2},  # LFM2
        {"full_attn_idxs": [1, 3], "layer_types": None},
        {"attn_layer_indices": [1, 3]},  # Bamba
        {"attn_layer_period": 2, "attn_layer_offset": 1},  # Jamba, as on disk
        {"full_attention_interval": 2},  # Qwen3-Next, as on disk
        {"hybrid_override_pattern": "M*M*"},  # Nemotron-H, as on disk
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_all_families_say_the_same(fields: dict[str, Any]) -> None:
    assert layer_types(text(**fields)) == (STATE, FULL, STATE, FULL)
    assert full_layers(text(**fields)) == (1, 3)


def test_layers_without_a_cache_are_counted_too() -> None:
    found = layer_types(text(hybrid_override_pattern="M-E*"))
    assert found == (STATE, NO_CACHE, NO_CACHE, FULL) and set(found) <= SERVED
    assert named_layers(text(layers_block_type=["mamba", "mlp", "moe", "attention"])) == found


def test_attention_beside_a_state_attends_to_everything() -> None:
    assert full_layers(text(layers_block_type=["hybrid"] * 4)) == (0, 1, 2, 3)


def test_an_unknown_word_stays_what_it_is() -> None:
    assert layer_types(text(layer_types=["chunked_attention", FULL]))[0] == "chunked_attention"
    assert "?" in layer_types(text(hybrid_override_pattern="M?**"))


@pytest.mark.parametrize("fields", [{}, {"layer_types": None}, {"attn_layer_period": 2}])
def test_a_configuration_may_not_tell_layers_apart(fields: dict[str, Any]) -> None:
    assert named_layers(text(**fields)) is None


@pytest.mark.parametrize(
    "fields",
    [{"full_attention_interval": 1}, {"attn_layer_period": 1, "attn_layer_offset": 0}],
    ids=str,
)
def test_a_period_of_one_layer_leaves_no_state(fields: dict[str, Any]) -> None:
    assert named_layers(text(**fields)) == (FULL,) * 4


@pytest.mark.parametrize(
    "config",
    [
        "Lfm2Config", "GraniteMoeHybridConfig", "JambaConfig", "NemotronHConfig",
        "Qwen3NextConfig", "Qwen3_5TextConfig", "Zamba2Config", "FalconH1Config",
        "OlmoHybridConfig", "BambaConfig",
    ],
)  # fmt: skip
def test_configurations_of_transformers_are_understood(config: str) -> None:
    """Of the defaults that transformers gives a family, we know every word."""
    import transformers

    made = getattr(transformers, config)()
    found = layer_types(made)
    assert len(found) == made.num_hidden_layers and set(found) <= SERVED
    named = getattr(made, "layer_types", None) or made.layers_block_type
    full = [i for i, word in enumerate(named) if word in ("attention", FULL, "hybrid")]
    assert full_layers(made) == tuple(full)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"model_type": "llama"}, False),
        ({"model_type": "jamba"}, True),
        ({"model_type": "nemotron_h"}, True),
        ({"model_type": "granitemoehybrid"}, True),
        ({"model_type": "granitemoehybrid", "position_embedding_type": "nope"}, True),
        ({"model_type": "granitemoehybrid", "position_embedding_type": "rope"}, False),
        ({"model_type": "olmo_hybrid"}, True),
        ({"model_type": "olmo_hybrid", "rope_parameters": None}, True),
        ({"model_type": "olmo_hybrid", "rope_parameters": {"rope_theta": None}}, True),
        ({"model_type": "olmo_hybrid", "rope_parameters": {"rope_theta": 1e6}}, False),
    ],
)
def test_models_without_rotary_embeddings(fields: dict[str, Any], expected: bool) -> None:
    assert turns_no_keys(text(**fields)) is expected

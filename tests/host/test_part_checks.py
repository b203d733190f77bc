"""Policies that need a part that a model does not have are refused, naming those that work."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.host.test_attention_probe import NOPE, config
from vllm_kvcompress.config.reading import parse_config, preset_names
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.host.part_checks import (
    Turning,
    check_parts,
    has_output_projections,
    keys_turn,
)


def model(text: Any, on_transformers: bool = True) -> Any:
    """As far as a model configuration is looked at."""
    return SimpleNamespace(
        model="some/model",
        hf_text_config=text,
        max_model_len=512,
        trust_remote_code=False,
        using_transformers_backend=lambda: on_transformers,
    )


SOME_WITHOUT = model(config("smollm3", no_rope_layers=NOPE))
ALL = model(config("olmo2"))
GATED = model(config("afmoe", head_dim=32, num_experts=2, num_dense_layers=4,
                     layer_types=["full_attention"] * 4))  # fmt: skip
STRANGE = model(config("bloom", n_head=4, n_layer=2, rope_parameters={"rope_type": "default"}))
NORMED = model(config("hunyuan_v1_dense", head_dim=32))  # once keys are turned


@pytest.mark.parametrize(
    ("given", "turning", "projects"),
    [
        (NORMED, Turning.UNKNOWN, True),
        (ALL, Turning.ALIKE, True),
        (SOME_WITHOUT, Turning.PARTLY, True),
        (GATED, Turning.ALIKE, False),  # none turns
        (STRANGE, Turning.UNKNOWN, False),
        # vLLM's own classes: what the configuration says, but for layers that are known not to turn
        (model(STRANGE.hf_text_config, on_transformers=False), Turning.ALIKE, True),
        (model(SOME_WITHOUT.hf_text_config, on_transformers=False), Turning.PARTLY, True),
    ],
)
def test_what_is_known_beforehand(given: Any, turning: Turning, projects: bool) -> None:
    assert keys_turn(given) is turning
    assert has_output_projections(given) is projects


def test_a_replay_runs_the_classes_that_were_probed() -> None:
    assert keys_turn(SimpleNamespace(hf_text_config=NORMED.hf_text_config)) is Turning.UNKNOWN
    assert keys_turn(SimpleNamespace(hf_text_config=ALL.hf_text_config)) is Turning.ALIKE


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_fits_where_all_parts_are(name: str) -> None:
    setting = parse_config(name)
    assert setting is not None
    check_parts(setting, ALL)


REFUSED = {
    "SOME_WITHOUT": {"streaming_llm_rerotated", "spindlekv"},
    "NORMED": {"streaming_llm_rerotated", "spindlekv", "expected_attention"},
    "STRANGE": {"streaming_llm_rerotated", "spindlekv", "expected_attention", "criticalkv"},
}


@pytest.mark.parametrize(("given", "refused"), [
    (SOME_WITHOUT, REFUSED["SOME_WITHOUT"]), (STRANGE, REFUSED["STRANGE"]),
    (NORMED, REFUSED["NORMED"]),
])  # fmt: skip
def test_the_others_are_named(given: Any, refused: set[str]) -> None:
    for name in preset_names():
        setting = parse_config(name)
        assert setting is not None
        if name not in refused:
            check_parts(setting, given)
            continue
        with pytest.raises(ConfigError) as caught:
            check_parts(setting, given)
        message = str(caught.value)
        assert message.startswith(f"policy.name: {setting.policy.name} ") and "\n" not in message
        assert "some/model" in message
        offered = message.rpartition("presets ")[2].rstrip(".").split(", ")
        assert set(offered) == set(preset_names()) - refused

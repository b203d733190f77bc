"""What multimodal models are served without, and why."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.host.test_checks import Overlay
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.host.checks import check_config, check_setting
from vllm_kvcompress.host.hooks import install_hooks


@pytest.fixture(scope="module")
def config(probe_model: str) -> Any:
    """A real vLLM configuration of a text model."""
    install_hooks()
    return EngineArgs(model=probe_model, dtype="float32").create_engine_config()


def test_a_draft_model_beside_a_model_that_sees_images(config, probe_model: str) -> None:
    drafts: Any = {"method": "draft_model", "model": probe_model, "num_speculative_tokens": 3}
    args = EngineArgs(model=probe_model, dtype="float32", speculative_config=drafts)
    with_draft_model = args.create_engine_config()
    target = Overlay(with_draft_model.model_config, {"supports_multimodal_inputs": True})
    with pytest.raises(UnsupportedModelError, match=r"sees no images.*--language-model-only"):
        check_config(Overlay(with_draft_model, {"model_config": target}))


def test_what_turns_keys_does_not_go_with_images_under_mrope(config) -> None:
    model = config.model_config
    rope = {**model.hf_text_config.rope_parameters, "mrope_section": [4, 6, 6]}
    text = SimpleNamespace(
        rope_parameters=rope, num_hidden_layers=model.get_total_num_hidden_layers()
    )
    both = Overlay(
        model, {"hf_text_config": text, "uses_mrope": True, "supports_multimodal_inputs": True}
    )
    text_only = Overlay(both, {"supports_multimodal_inputs": False})
    policies: tuple[Any, ...] = (
        "expected_attention", "streaming_llm_rerotated", "spindlekv",
    )  # fmt: skip
    for given in policies:
        setting = parse_config(given)
        check_setting(setting, Overlay(config, {"model_config": text_only}))
        with pytest.raises(ConfigError, match=r"several positions .*--language-model-only"):
            check_setting(setting, Overlay(config, {"model_config": both}))
    check_setting(parse_config("snapkv"), Overlay(config, {"model_config": both}))


def test_no_compaction_comes_between_tokens_that_see_each_other(config) -> None:
    """Gemma 3 lets the tokens of an image see each other both ways."""
    given: dict[str, Any] = {"is_mm_prefix_lm": True, "supports_multimodal_inputs": True}
    inside = parse_config({"preset": "snapkv", "trigger": "prompt"})
    both_ways = Overlay(config.model_config, given)
    with pytest.raises(ConfigError, match=r"^trigger: .*both ways.*--language-model-only"):
        check_setting(inside, Overlay(config, {"model_config": both_ways}))
    check_setting(parse_config("snapkv"), Overlay(config, {"model_config": both_ways}))
    for name in given:
        one_way = Overlay(config.model_config, {**given, name: False})
        check_setting(inside, Overlay(config, {"model_config": one_way}))


@pytest.mark.parametrize(
    "what", ["supports_multimodal_inputs", "enable_prompt_embeds", "uses_mrope"]
)
def test_drafts_go_with_token_ids_only(config, what: str) -> None:
    changed = Overlay(config, {"model_config": Overlay(config.model_config, {what: True})})
    with pytest.raises(ConfigError, match=r"^mode: .*leave out draft mode"):
        check_setting(parse_config({"preset": "snapkv", "mode": "draft"}), changed)
    check_setting(parse_config("snapkv"), changed)

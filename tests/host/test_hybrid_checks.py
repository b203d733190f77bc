"""Models with recurrent layers: those that were tried, and what does not go with them."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.host.checks import check_setting
from vllm_kvcompress.host.hybrid_checks import hybrid_model
from vllm_kvcompress.host.model_checks import (
    has_plain_rotary,
    layer_groups_warning,
    layer_kinds,
    partial_attention,
)
from vllm_kvcompress.lengths.layer_kinds import TRIED_HYBRIDS

ROPE = {"rope_type": "default", "rope_theta": 1e6}


def config(
    architecture: str = "Lfm2ForCausalLM", text: dict[str, Any] | None = None, **changes: Any
) -> Any:
    fields = {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention"] * 2,
        "model_type": "lfm2",
        "rope_parameters": ROPE,
        **(text or {}),
    }
    model = SimpleNamespace(
        model="a/model",
        architecture=architecture,
        is_hybrid=True,
        is_moe=False,
        use_mla=False,
        uses_mrope=False,
        supports_multimodal_inputs=False,
        enable_prompt_embeds=False,
        max_model_len=1024,
        hf_text_config=SimpleNamespace(**fields),
    )
    cache = SimpleNamespace(use_replayssm=False, prefix_match_unit=None, cache_dtype="auto")
    made = SimpleNamespace(
        model_config=model,
        cache_config=cache,
        speculative_config=None,
        quant_config=None,
        lora_config=None,
        watermark_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=1),
    )
    for place, value in changes.items():
        part, _, name = place.partition("__")
        if name:
            setattr(getattr(made, part), name, value)
        else:
            setattr(made, part, value)
    return made


@pytest.mark.parametrize("architecture", TRIED_HYBRIDS)
def test_what_was_tried_is_served(architecture: str) -> None:
    assert hybrid_model(config(architecture)) is None
    assert layer_kinds(config(architecture)) is None


def test_other_models_are_asked_nothing() -> None:
    other = config("LlamaForCausalLM", model_config__is_hybrid=False)
    assert hybrid_model(other) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "JambaForCausalLM"}, ["JambaForCausalLM", "not been tried", "Lfm2"]),
        (
            {"speculative_config": SimpleNamespace(method="ngram")},
            ["recurrent layers", "remove --speculative-config"],
        ),
        ({"cache_config__use_replayssm": True}, ["remove --use-replayssm"]),
        ({"cache_config__prefix_match_unit": 16}, ["remove --prefix-match-unit"]),
    ],
)
def test_refusals(changes: dict[str, Any], words: list[str]) -> None:
    reason = hybrid_model(config(**changes))
    assert reason is not None and "\n" not in reason
    for word in words:
        assert word in reason


def test_recurrent_layers_alone_are_no_work() -> None:
    reason = layer_kinds(config(text={"layer_types": ["conv"] * 4}))
    assert reason is not None and "no layer of a/model attends to everything" in reason


def test_a_draft_model_of_that_kind_is_refused() -> None:
    beside = {"layer_types": ["hybrid"] * 4}
    assert partial_attention(config(text=beside).model_config) is not None


def test_drafts_are_refused() -> None:
    drafting = parse_config({"preset": "snapkv", "mode": "draft"})
    assert drafting is not None
    with pytest.raises(ConfigError, match="recurrent layers, whose states.*leave out draft mode"):
        check_setting(drafting, config())


def test_without_rotary_embeddings_policies_that_turn_keys_are_refused() -> None:
    granite = config("GraniteMoeHybridForCausalLM", {"model_type": "granitemoehybrid"})
    assert has_plain_rotary(config().model_config) and not has_plain_rotary(granite.model_config)
    turning = parse_config("expected_attention")
    assert turning is not None
    with pytest.raises(ConfigError, match="has no rotary embedding; choose another policy"):
        check_setting(turning, granite)
    coded = parse_config({"preset": "snapkv", "codebook": {"groups": [0]}})
    assert coded is not None
    with pytest.raises(ConfigError, match="recurrent layers, beside which codebooks have not"):
        check_setting(coded, granite)


def test_layer_groups_are_said_to_multiply_tables_beside_recurrent_layers() -> None:
    """Feed-forward layers, which Nemotron-H counts as layers, have no table."""
    model = config(text={"layer_types": ["conv", "full_attention", "conv", "full_attention"]})
    setting = parse_config({"preset": "snapkv", "layer_groups": {"count": 2}})
    assert setting is not None
    said = layer_groups_warning(setting, model.model_config)
    assert said is not None and said.startswith(
        "layer_groups: 2 layer groups beside 2 recurrent layers make 4 block tables where one "
        "group makes 2, "
    )
    nemotron = config("NemotronHForCausalLM", {"layer_types": ["mlp", "full_attention"] * 2})
    assert layer_groups_warning(setting, nemotron.model_config) is None

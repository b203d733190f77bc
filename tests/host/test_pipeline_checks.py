"""Pipeline stages: which settings their layers can carry out by themselves."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.host.pipeline_checks import check_pipeline_setting, pipeline, stages


def config(size: int, layer_types: list[str] | None = None, **changes: Any) -> SimpleNamespace:
    """What is read of vLLM's configuration, of a model of six layers."""
    text = SimpleNamespace(num_hidden_layers=6, sliding_window=64, layer_types=layer_types)
    if layer_types is None:
        text.sliding_window = None
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=text,
            max_model_len=1024,
            use_mla=False,
            is_hybrid=False,
            supports_multimodal_inputs=False,
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=size),
        speculative_config=changes.get("speculative_config"),
    )


FULL, WINDOWED = "full_attention", "sliding_attention"


def test_every_layer_has_the_stage_that_vllm_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stages(config(1)) == [0] * 6
    assert stages(config(2)) == [0, 0, 0, 1, 1, 1]
    assert stages(config(4)) == [0, 1, 1, 2, 2, 3], "as vLLM spreads what is left over"
    assert stages(config(2, [WINDOWED, FULL] * 3)) == [0, 1, 1], "layers 1, 3 and 5"
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,5")
    assert stages(config(2)) == [0, 1, 1, 1, 1, 1]


def test_a_stage_needs_a_layer_to_compact() -> None:
    assert pipeline(config(1)) is None and pipeline(config(2)) is None
    message = pipeline(config(2, [WINDOWED] * 3 + [FULL] * 3))
    assert message is not None and message.startswith("--pipeline-parallel-size 2 leaves a stage")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preset": "snapkv", "mode": "draft"}, "mode: drafts run all layers"),
        ({"preset": "spindlekv"}, "codebook: "),
        (
            {"preset": "windowkv", "policy": {"layers_per_leader": None}},
            "policy: layer 0 ranks for layer 3",
        ),
        (
            {"preset": "windowkv", "policy": {"layers_per_leader": 2}},
            "policy: layer 2 ranks for layer 3",
        ),
    ],
)
def test_what_crosses_a_stage_is_refused(changes: dict[str, Any], words: str) -> None:
    setting = parse_config(changes)
    assert setting is not None
    check_pipeline_setting(setting, config(1))
    with pytest.raises(ConfigError, match=words) as caught:
        check_pipeline_setting(setting, config(2))
    assert "--pipeline-parallel-size" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "snapkv"},
        {"preset": "pyramidkv"},
        {"preset": "windowkv"},
        {"preset": "windowkv", "policy": {"layers_per_leader": 3}},
        {
            "preset": "windowkv",
            "policy": {"layers_per_leader": None},
            "layer_groups": {"count": 2},
        },
    ],
)
def test_what_stays_on_a_stage_is_welcome(changes: dict[str, Any]) -> None:
    setting = parse_config(changes)
    assert setting is not None
    check_pipeline_setting(setting, config(2))


def test_drafts_beside_stages_are_refused() -> None:
    setting = parse_config({"preset": "snapkv"})
    assert setting is not None
    drafting = config(2, speculative_config=SimpleNamespace(method="eagle"))
    with pytest.raises(ConfigError, match="--speculative-config: .*pipeline stages"):
        check_pipeline_setting(setting, drafting)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("use_mla", "multi-head latent attention (MLA)"),
        ("is_hybrid", "recurrent layers"),
        ("supports_multimodal_inputs", "images"),
    ],
)
def test_kinds_of_models_that_have_not_been_tried_on_stages(kind: str, words: str) -> None:
    given = config(2)
    setattr(given.model_config, kind, True)
    sentence = f"--pipeline-parallel-size 2 with {words} has not been tried: set it to 1"
    assert pipeline(given) == sentence
    given.parallel_config.pipeline_parallel_size = 1
    assert pipeline(given) is None

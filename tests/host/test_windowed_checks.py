"""Settings on models with windowed layers: what is refused, and what is only said."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from lab.random_models import write_random_model
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.host import hooks
from vllm_kvcompress.host.checks import check_setting
from vllm_kvcompress.host.hooks import install_hooks

SLIDING, FULL = "sliding_attention", "full_attention"
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
OTHER = {"rope_type": "default", "rope_theta": 1e6}
TURNING = {"preset": "streaming_llm", "policy": {"rerotate_keys": True}}
CODED = {"preset": "snapkv", "codebook": {"shallow": 1.0, "entries": 0.5}}


def config(max_len: int, **fields: Any) -> Any:
    """What `check_setting` reads of vLLM's configuration."""
    text = {
        "num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "sliding_window": 512,
        "rope_parameters": PLAIN, "model_type": "mistral",
    }  # fmt: skip
    model = SimpleNamespace(
        model="m", hf_text_config=SimpleNamespace(**{**text, **fields}), max_model_len=max_len,
        is_moe=False, is_hybrid=False, use_mla=False, uses_mrope=False, enable_prompt_embeds=False,
        supports_multimodal_inputs=False,
    )  # fmt: skip
    return SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(data_parallel_size=1, pipeline_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        quant_config=None,
        lora_config=None,
        watermark_config=None,
        speculative_config=None,
    )


def check(setting: Any, vllm_config: Any) -> None:
    parsed = parse_config(setting)
    assert parsed is not None
    check_setting(parsed, vllm_config)


@pytest.mark.parametrize("setting", [TURNING, CODED], ids=["rerotation", "codebook"])
@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {FULL: OTHER, SLIDING: PLAIN}},  # Gemma 3
        {"model_type": "cohere2"},
        {"model_type": "exaone4"},
    ],
)
def test_layers_of_a_group_must_turn_alike(setting: Any, fields: dict[str, Any]) -> None:
    """Where no sequence outgrows the window, both kinds of layers are in one group."""
    check(setting, config(4096, **fields))
    check("snapkv", config(512, **fields))
    check(setting, config(512))
    check(setting, config(512, layer_types=[FULL] * 4, model_type="exaone4"))
    with pytest.raises(ConfigError, match=r"window of m.*another policy.*--max-model-len above"):
        check(setting, config(512, **fields))


def test_phi_4_minis_long_rope_refuses_what_turns_keys() -> None:
    phi = config(
        131072, layer_types=None, sliding_window=262144, model_type="phi3",
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4},
    )  # fmt: skip
    for preset in ("snapkv", "h2o", "keydiff", "criticalkv", "windowkv"):
        check(preset, phi)
    for setting in (TURNING, {"preset": "expected_attention"}):
        with pytest.raises(ConfigError, match="scales its rotary embedding"):
            check(setting, phi)
    with pytest.raises(ConfigError, match="codebook: .*leave codebook out"):
        check(CODED, phi)


def test_the_rotary_embedding_of_the_full_layers_counts() -> None:
    """Gemma 3 scales that of its full layers in the larger models."""
    scaled = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    small = config(4096, rope_parameters={FULL: OTHER, SLIDING: PLAIN})
    large = config(4096, rope_parameters={FULL: scaled, SLIDING: PLAIN})
    check("expected_attention", small)
    with pytest.raises(ConfigError, match="scales its rotary embedding"):
        check("expected_attention", large)


def test_drafts_over_windowed_layers_are_refused() -> None:
    for setting in (
        {"preset": "snapkv", "mode": "draft"},
        {"preset": "snapkv", "draft": {"budget": {"ratio": 0.06}}},
    ):
        with pytest.raises(ConfigError, match="windowed layers.*leave out draft mode"):
            check(setting, config(4096))


def test_more_layer_groups_are_warned_of_at_start_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_hooks()
    model, lines = str(write_random_model(tmp_path, "gemma3")), []
    monkeypatch.setattr(hooks.logger, "warning", lambda text, *args: lines.append(text % args))
    for preset, expected in (("snapkv", False), ("pyramidkv", True)):
        lines.clear()
        EngineArgs(
            model=model, skip_tokenizer_init=True, additional_config={"kv_compression": preset}
        ).create_engine_config()
        said = "2 layer groups beside 2 windowed layers make 4 block tables where one group makes 2"
        assert any(said in line for line in lines) is expected, preset

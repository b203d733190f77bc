"""Every start-up refusal: the reason is named, the option to change is named."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs

from vllm_kvcompress.checks import check_config, check_layer, check_setting
from vllm_kvcompress.config import parse_config
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.vllm_hooks import install_hooks

SNAPKV = {"kv_compression": "snapkv"}


@pytest.fixture(scope="module")
def config(probe_model: str) -> Any:
    """A real vLLM configuration, without compression, that every check accepts."""
    install_hooks()
    config = EngineArgs(model=probe_model, dtype="float32").create_engine_config()
    check_config(config)
    return config


def test_a_supported_configuration_gets_our_classes(probe_model: str) -> None:
    install_hooks()
    args = EngineArgs(model=probe_model, dtype="float32", additional_config=SNAPKV)
    config = args.create_engine_config()
    assert config.scheduler_config.scheduler_cls.endswith("CompressedScheduler")
    assert config.parallel_config.worker_cls.startswith("vllm_kvcompress.worker.")
    assert config.additional_config["kv_compression"]["policy"]["name"] == "snapkv"
    if torch.cuda.is_available():
        return
    assert config.cache_config.block_size == 32, "finer than the CPU's default of 128"


def test_without_the_setting_nothing_is_touched(config) -> None:
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_cls.startswith("vllm.")
    assert config.cache_config.block_size != 32


def test_the_users_block_size_wins(probe_model: str) -> None:
    args = EngineArgs(model=probe_model, dtype="float32", additional_config=SNAPKV, block_size=64)
    assert args.create_engine_config().cache_config.block_size == 64


def test_wrong_settings_are_refused_by_the_library_too(probe_model: str) -> None:
    args = EngineArgs(model=probe_model, additional_config={"kv_compression": "snapkw"})
    with pytest.raises(ConfigError, match="did you mean 'snapkv'"):
        args.create_engine_config()


MODEL = "model_config"
REFUSALS = [
    (MODEL, {"runner_type": "pooling"}, ["--runner pooling"]),
    (MODEL, {"is_encoder_decoder": True}, ["encoder-decoder", "decoder-only"]),
    (MODEL, {"use_mla": True}, ["MLA"]),
    (MODEL, {"is_hybrid": True}, ["hybrid"]),
    (MODEL, {"is_attention_free": True}, ["attention-free"]),
    (MODEL, {"is_multimodal_model": True}, ["multimodal"]),
    (MODEL, {"is_diffusion": True}, ["diffusion"]),
    (MODEL, {"hf_text_config": SimpleNamespace(sliding_window=512)}, ["sliding-window"]),
    (
        MODEL,
        {"hf_text_config": SimpleNamespace(layer_types=["full_attention", "sliding_attention"])},
        ["sliding-window"],
    ),
    ("parallel_config", {"decode_context_parallel_size": 2}, ["--decode-context-parallel-size 2"]),
    ("parallel_config", {"prefill_context_parallel_size": 2}, ["--prefill-context-parallel-size"]),
    ("parallel_config", {"pipeline_parallel_size": 2}, ["--pipeline-parallel-size 2", "1"]),
    ("parallel_config", {"use_ubatching": True}, ["--enable-dbo"]),
    ("parallel_config", {"worker_cls": "my.Worker"}, ["--worker-cls my.Worker"]),
    ("scheduler_config", {"scheduler_cls": "my.Scheduler"}, ["--scheduler-cls"]),
    (
        "scheduler_config",
        {"disable_hybrid_kv_cache_manager": True},
        ["--disable-hybrid-kv-cache-manager"],
    ),
    ("cache_config", {"cache_dtype": "fp8"}, ["fp8", "--kv-cache-dtype auto"]),
    (
        "compilation_config",
        {"cudagraph_mode": CUDAGraphMode.FULL},
        ["-cc.cudagraph_mode=FULL_AND_PIECEWISE"],
    ),
    (None, {"kv_transfer_config": object()}, ["--kv-transfer-config"]),
    (None, {"ec_transfer_config": object()}, ["--ec-transfer-config"]),
    (None, {"speculative_config": SimpleNamespace(method="eagle")}, ["method eagle", "ngram"]),
    (None, {"use_v2_model_runner": False}, ["model runner V2", "VLLM_USE_V2_MODEL_RUNNER"]),
]


class Overlay:
    """A configuration with some attributes changed."""

    def __init__(self, base: Any, changes: dict[str, Any]) -> None:
        self._base = base
        self.__dict__.update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


@pytest.mark.parametrize(
    ("part", "changes", "words"), REFUSALS, ids=[next(iter(c)) for _, c, _ in REFUSALS]
)
def test_refusals(config, part: str | None, changes: dict, words: list[str]) -> None:
    if part is None:
        changed = Overlay(config, changes)
    else:
        changed = Overlay(config, {part: Overlay(getattr(config, part), changes)})
    with pytest.raises(UnsupportedModelError) as caught:
        check_config(changed)
    message = str(caught.value)
    assert message.startswith("--kv-compression: ") and "\n" not in message
    assert message.endswith("drop --kv-compression.")
    for word in words:
        assert word in message


def test_ngram_drafts_are_welcome(config) -> None:
    check_config(Overlay(config, {"speculative_config": SimpleNamespace(method="ngram")}))


def test_settings_that_do_not_fit_the_model(config) -> None:
    preferences = {"layer_budget": {"shape": "preference", "preferences": [2, 1]}}
    two = parse_config("snapkv", {**preferences, "layer_groups": {"count": 2}})
    check_setting(two, config)
    with pytest.raises(ConfigError, match="2 numbers and 4 layer groups"):
        check_setting(parse_config("snapkv", {**preferences, "layer_groups": {"size": 1}}), config)
    text = SimpleNamespace(rope_parameters={"rope_type": "yarn"}, num_hidden_layers=4)
    scaled = Overlay(
        config, {"model_config": Overlay(config.model_config, {"hf_text_config": text})}
    )
    check_setting(parse_config("snapkv"), scaled)
    for preset in ("expected_attention", "streaming_llm_rerotated"):
        check_setting(parse_config(preset), config)
        with pytest.raises(ConfigError, match="scales its rotary embedding"):
            check_setting(parse_config(preset), scaled)


def test_full_decode_graphs_are_welcome(config) -> None:
    for mode in ("NONE", "PIECEWISE", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"):
        compilation = Overlay(config.compilation_config, {"cudagraph_mode": CUDAGraphMode[mode]})
        check_config(Overlay(config, {"compilation_config": compilation}))


def test_an_untested_vllm_is_refused(config, monkeypatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.33.1")
    with pytest.raises(UnsupportedModelError, match=r"0\.33\.1.*install vllm==0\.32\.0"):
        check_config(config)


def layer(backend: str = "FLASH_ATTN", sharing: str | None = None, **impl: Any) -> SimpleNamespace:
    return SimpleNamespace(
        impl=SimpleNamespace(**impl),
        kv_sharing_target_layer_name=sharing,
        get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend),
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (layer(sharing="model.layers.0"), "shares the KV cache"),
        (layer(alibi_slopes=torch.ones(2)), "ALiBi"),
        (layer(logits_soft_cap=50.0), "soft cap"),
        (layer(sinks=torch.ones(2)), "sinks"),
        (layer(backend="FLEX_ATTENTION"), "--attention-backend"),
    ],
)
def test_layers_that_compaction_would_break(given, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        check_layer("model.layers.1", given)


def test_ordinary_layers_pass() -> None:
    check_layer("l", layer(alibi_slopes=None, logits_soft_cap=0, sinks=None))
    check_layer("l", layer("CPU_ATTN"))

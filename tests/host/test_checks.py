"""Every start-up refusal: the reason is named, the option to change is named."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.config.multimodal import MultiModalConfig
from vllm.config.watermarking import WatermarkConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.host.checks import READ_VLLM, check_config, check_setting
from vllm_kvcompress.host.hooks import install_hooks
from vllm_kvcompress.host.model_checks import check_layer

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
WINDOWED = SimpleNamespace(num_hidden_layers=2, sliding_window=512)
REFUSALS = [
    (MODEL, {"runner_type": "pooling"}, ["--runner pooling"]),
    (MODEL, {"enable_sleep_mode": True}, ["--enable-sleep-mode"]),
    (MODEL, {"is_encoder_decoder": True}, ["encoder-decoder", "decoder-only"]),
    (MODEL, {"use_mla": True}, ["latent attention (MLA) of the kind llama", "deepseek_v3"]),
    (MODEL, {"is_hybrid": True}, ["hybrid"]),
    (MODEL, {"is_attention_free": True}, ["attention-free"]),
    (
        MODEL,
        {"multimodal_config": MultiModalConfig(video_pruning_rate=0.5)},
        ["drops tokens of videos", "remove --video-pruning-rate"],
    ),
    (MODEL, {"is_diffusion": True}, ["diffusion"]),
    (
        MODEL,
        {"hf_text_config": SimpleNamespace(num_hidden_layers=2, sliding_window=512)},
        ["all layers", "sliding-window", "512"],
    ),
    (
        MODEL,
        {
            "hf_text_config": SimpleNamespace(
                num_hidden_layers=2, layer_types=["full_attention", "chunked_attention"]
            )
        },
        ["chunked_attention"],
    ),
    ("parallel_config", {"decode_context_parallel_size": 2}, ["--decode-context-parallel-size 2"]),
    ("parallel_config", {"prefill_context_parallel_size": 2}, ["--prefill-context-parallel-size"]),
    (
        "parallel_config",
        {"pipeline_parallel_size": 5},  # of four layers
        ["--pipeline-parallel-size 5", "lower it", "VLLM_PP_LAYER_PARTITION"],
    ),
    ("parallel_config", {"use_ubatching": True}, ["--enable-dbo"]),
    ("parallel_config", {"worker_cls": "my.Worker"}, ["--worker-cls my.Worker"]),
    ("scheduler_config", {"scheduler_cls": "my.Scheduler"}, ["--scheduler-cls"]),
    (
        "scheduler_config",
        {"disable_hybrid_kv_cache_manager": True},
        ["--disable-hybrid-kv-cache-manager"],
    ),
    ("cache_config", {"cache_dtype": "nvfp4"}, ["nvfp4", "--kv-cache-dtype auto"]),
    (
        "compilation_config",
        {"cudagraph_mode": CUDAGraphMode.FULL},
        ["-cc.cudagraph_mode=FULL_AND_PIECEWISE"],
    ),
    (None, {"kv_transfer_config": object()}, ["--kv-transfer-config"]),
    (None, {"ec_transfer_config": object()}, ["--ec-transfer-config"]),
    *(
        (
            None,
            {"speculative_config": SimpleNamespace(method=method)},
            [f"method {method}", "ngram_gpu, draft_model, eagle, eagle3", "--speculative-config"],
        )
        for method in ("dflash", "medusa", "suffix")
    ),
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


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu"])
def test_ngram_drafts_are_welcome(config, method: str) -> None:
    check_config(Overlay(config, {"speculative_config": SimpleNamespace(method=method)}))


@pytest.fixture(scope="module")
def with_draft_model(probe_model: str) -> Any:
    """A real vLLM configuration with the probe model as its own draft model."""
    install_hooks()
    drafts: Any = {"method": "draft_model", "model": probe_model, "num_speculative_tokens": 3}
    args = EngineArgs(model=probe_model, dtype="float32", speculative_config=drafts)
    return args.create_engine_config()


def test_a_draft_model_is_welcome(with_draft_model) -> None:
    assert with_draft_model.speculative_config.method == "draft_model"
    check_config(with_draft_model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"draft_model_config": {"is_hybrid": True}}, ["the draft model", "partial-attention"]),
        ({"draft_model_config": {"use_mla": True}}, ["the draft model", "MLA"]),
        (
            {"draft_model_config": {"is_multimodal_model": True}},
            ["the draft model", "multimodal", "text model"],
        ),
        (
            {
                "draft_model_config": {
                    "hf_text_config": SimpleNamespace(num_hidden_layers=2, sliding_window=512)
                }
            },
            ["the draft model", "sliding-window"],
        ),
        ({"kv_cache_dtype": "fp8"}, ["(fp8)", "remove kv_cache_dtype"]),
        (
            {"draft_tensor_parallel_size": 2},
            ["draft_tensor_parallel_size 2", "--tensor-parallel-size 1"],
        ),
        ({"enable_adaptive_verification": True}, ["remove enable_adaptive_verification"]),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_draft_models_that_do_not_fit(with_draft_model, changes: dict, words: list[str]) -> None:
    given = with_draft_model.speculative_config
    changes = {
        name: Overlay(getattr(given, name), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    changed = Overlay(with_draft_model, {"speculative_config": Overlay(given, changes)})
    with pytest.raises(UnsupportedModelError) as caught:
        check_config(changed)
    message = str(caught.value)
    assert message.startswith("--kv-compression: --speculative-config: ") and "\n" not in message
    for word in words:
        assert word in message


def test_the_mode_draft_takes_no_draft_model(probe_model: str) -> None:
    install_hooks()
    drafts: Any = {"method": "draft_model", "model": probe_model, "num_speculative_tokens": 3}
    setting = {"kv_compression": {"preset": "snapkv", "mode": "draft"}}
    args = EngineArgs(
        model=probe_model, dtype="float32", additional_config=setting, speculative_config=drafts
    )
    with pytest.raises(ConfigError, match="--speculative-config: the mode draft brings its own"):
        args.create_engine_config()


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


def test_a_vllm_that_was_only_read_is_refused_and_says_so(config, monkeypatch) -> None:
    for version in READ_VLLM:
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        with pytest.raises(UnsupportedModelError, match="only the sources were read: install"):
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
        (layer(backend="FLEX_ATTENTION"), "--attention-backend"),
    ],
)
def test_layers_that_compaction_would_break(given, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        check_layer("model.layers.1", given)


def test_ordinary_layers_pass() -> None:
    check_layer("l", layer(alibi_slopes=None, logits_soft_cap=50.0, sinks=torch.ones(2)))
    check_layer("l", layer("CPU_ATTN"))


def test_typical_acceptance_and_a_watermark_exclude_each_other(config, monkeypatch) -> None:
    typical = {"preset": "snapkv", "mode": "draft", "draft": {"acceptance": "typical"}}
    check_setting(parse_config(typical), config)
    monkeypatch.setattr(config, "watermark_config", WatermarkConfig(key=1))
    with pytest.raises(ConfigError, match=r"draft\.acceptance.*rejection.*--watermark-config"):
        check_setting(parse_config(typical), config)
    check_setting(parse_config({**typical, "draft": {}}), config)


def test_drafts_and_adapters_exclude_each_other(config) -> None:
    """Tried on a CPU: the first draft step ended the engine."""
    lora = Overlay(config, {"lora_config": object()})
    check_setting(parse_config("snapkv"), lora)
    over_evicted = {"preset": "snapkv", "draft": {"budget": {"ratio": 0.06}}}
    for setting in ({"preset": "snapkv", "mode": "draft"}, over_evicted):
        check_setting(parse_config(setting), config)
        with pytest.raises(ConfigError, match="leave out draft mode.*--enable-lora"):
            check_setting(parse_config(setting), lora)


def rotary(config: Any, kind: str | None) -> Any:
    """The configuration with another rotary embedding, or none."""
    text = vars(config.model_config.hf_text_config) | {
        "rope_parameters": kind and {"rope_type": kind, "rope_theta": 1e4}
    }
    model = Overlay(config.model_config, {"hf_text_config": SimpleNamespace(**text)})
    return Overlay(config, {"model_config": model})


@pytest.mark.parametrize("kind", ["yarn", "dynamic", None])
def test_codebooks_need_plain_rotary_embeddings(config, kind: str | None) -> None:
    """Keys are coded before RoPE, which must be undone by position and frequency alone."""
    changed = rotary(config, kind)
    with pytest.raises(ConfigError, match="^codebook: .*rotary.*leave codebook out"):
        check_setting(parse_config("spindlekv"), changed)
    with pytest.raises(ConfigError, match="^codebook: "):
        tasks = {"localization": {}, "aggregation": {"codebook": {"shallow": 0.5}}}
        check_setting(parse_config({"preset": "snapkv", "tasks": tasks}), changed)
    check_setting(parse_config("spindlekv-evict"), changed)


@pytest.mark.parametrize("kind", ["default", "llama3"])
def test_codebooks_of_models_with_plain_rotary_embeddings(config, kind: str) -> None:
    check_setting(parse_config("spindlekv"), rotary(config, kind))


def test_a_codebook_must_fit_the_models_layer_groups(config) -> None:
    """The probe model has 4 layers."""
    for book, groups, words in (
        ({"groups": [4]}, {"size": 1}, r"codebook\.groups: .*layer group 4; allowed are 0 to 3"),
        ({"groups": [2]}, {"count": 2}, r"codebook\.groups: .*layer group 2; allowed are 0 to 1"),
        (
            {"shallow": 0.5, "entries": [0.5] * 3},
            {"size": 1},
            r"codebook\.entries: .*3 numbers and 2 coded",
        ),
    ):
        setting = {"preset": "spindlekv", "codebook": book, "layer_groups": groups}
        with pytest.raises(ConfigError, match=words):
            check_setting(parse_config(setting), config)
    fits = {"preset": "spindlekv", "codebook": {"groups": [3], "entries": [0.5]}}
    check_setting(parse_config(fits), config)
    with pytest.raises(ConfigError, match="layer group 4"):
        args = {**fits, "codebook": {"groups": [4]}}
        EngineArgs(
            model=config.model_config.model, additional_config={"kv_compression": args}
        ).create_engine_config()


def test_drafts_and_data_parallel_experts_exclude_each_other(config) -> None:
    drafts = parse_config({"preset": "snapkv", "mode": "draft"})
    parallel = Overlay(config.parallel_config, {"data_parallel_size": 2})
    experts = Overlay(config.model_config, {"is_moe": True})
    check_setting(drafts, Overlay(config, {"parallel_config": parallel}))
    check_setting(drafts, Overlay(config, {"model_config": experts}))
    both = Overlay(config, {"parallel_config": parallel, "model_config": experts})
    check_setting(parse_config("snapkv"), both)
    with pytest.raises(ConfigError, match=r"mode: .*experts.*--data-parallel-size"):
        check_setting(drafts, both)


def test_a_front_end_that_skips_our_checks_is_refused(config, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(UnsupportedModelError, match="unset VLLM_USE_RUST_FRONTEND"):
        check_config(config)

"""Which caches are served, and which settings go with those of 8 bits; refusals in a sentence."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

from tests.host.requests import incoming
from tests.host.test_checks import Overlay
from vllm_kvcompress.config.reading import CONFIG_KEY, parse_config
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.host import hooks
from vllm_kvcompress.host.cache_checks import cache_kind, has_eight_bits
from vllm_kvcompress.host.checks import check_config, check_setting
from vllm_kvcompress.host.model_checks import check_layer
from vllm_kvcompress.host.request_checks import check_request

FP8 = ["fp8", "fp8_e4m3", "fp8_e5m2"]
OTHERS = ["fp8_inc", "fp8_ds_mla", "nvfp4", "turboquant_4bit_nc", "ultraquant_4bit"]
OTHERS += [f"{kind}_per_token_head" for kind in ("int4", "int8", "fp8")]


@pytest.fixture(scope="module")
def config(probe_model: str) -> Any:
    """A real vLLM configuration with a cache of 8 bits, on a server that compresses."""
    hooks.install_hooks()
    return EngineArgs(
        model=probe_model, dtype="float32", kv_cache_dtype="fp8",
        additional_config={CONFIG_KEY: "snapkv"},
    ).create_engine_config()  # fmt: skip


def with_cache(config: Any, **changes: Any) -> Any:
    """It, with another cache; classes are the user's again."""
    scheduler = Overlay(config.scheduler_config, {"scheduler_cls": None})
    parallel = Overlay(
        config.parallel_config, {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}
    )
    cache = Overlay(config.cache_config, changes)
    return Overlay(
        config,
        {"scheduler_config": scheduler, "parallel_config": parallel, "cache_config": cache},
    )


def sentence(config: Any) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        check_config(config)
    message = str(caught.value)
    assert message.startswith("--kv-compression: ") and "\n" not in message
    assert message.endswith("drop --kv-compression.")
    return message


@pytest.mark.parametrize("dtype", FP8)
def test_caches_of_8_bits_are_welcome(config, dtype: str) -> None:
    changed = with_cache(config, cache_dtype=dtype)
    check_config(changed)
    assert has_eight_bits(changed)
    for preset in ("snapkv", "windowkv", "expected_attention", "criticalkv", "spindlekv-evict"):
        check_setting(parse_config(preset), changed)
    check_setting(parse_config({"preset": "snapkv", "mode": "draft"}), changed)


@pytest.mark.parametrize("dtype", OTHERS)
def test_other_quantised_caches_are_refused_by_name(config, dtype: str) -> None:
    message = sentence(with_cache(config, cache_dtype=dtype))
    assert f"({dtype})" in message and "--kv-cache-dtype auto or fp8" in message


def test_layers_of_both_kinds(config) -> None:
    changed = with_cache(config, kv_cache_dtype_skip_layers=["0"])
    assert "remove --kv-cache-dtype-skip-layers" in sentence(changed)
    check_config(with_cache(config, cache_dtype="auto", kv_cache_dtype_skip_layers=["0"]))


def test_what_a_checkpoint_asks_for_by_itself(config) -> None:
    """vLLM finds it while it builds the layers; what does not go with it is refused before."""
    scheme = {"type": "float", "num_bits": 8, "strategy": "tensor"}
    quantized = SimpleNamespace(kv_cache_scheme=scheme)
    changed = Overlay(with_cache(config, cache_dtype="auto"), {"quant_config": quantized})
    check_config(changed)
    assert has_eight_bits(changed)
    with pytest.raises(ConfigError, match="^codebook: "):
        check_setting(parse_config("spindlekv"), changed)
    quantized.kv_cache_scheme = {**scheme, "strategy": "attn_head"}
    message = sentence(changed)
    assert "a cache scale for every head" in message and "--kv-cache-dtype auto" in message
    other = Overlay(with_cache(config, cache_dtype="bfloat16"), {"quant_config": quantized})
    assert not has_eight_bits(other)


def test_a_draft_model(config) -> None:
    speculative = SimpleNamespace(
        method="draft_model", draft_model_config=config.model_config, kv_cache_dtype=None
    )
    changed = Overlay(with_cache(config), {"speculative_config": speculative})
    assert "a draft model beside a cache of 8 bits (fp8)" in sentence(changed)


@pytest.mark.parametrize(
    ("dtype", "capability", "words"),
    [
        ("fp8", 80, ["compute capability 8.9", "(fp8)", "--kv-cache-dtype auto"]),
        ("fp8_e4m3", 86, ["compute capability 8.9"]),
        ("fp8_e5m2", 90, ["e4m3 whatever the name", "--kv-cache-dtype fp8"]),
        ("fp8", 89, []),
        ("fp8_e4m3", 90, []),
        ("fp8", 100, []),
    ],
)
def test_gpus(config, monkeypatch, dtype: str, capability: int, words: list[str]) -> None:
    platform = SimpleNamespace(
        is_cuda=lambda: True, has_device_capability=lambda least: capability >= least
    )
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    reason = cache_kind(with_cache(config, cache_dtype=dtype))
    assert (reason is not None) == bool(words)
    for word in words:
        assert word in str(reason)


def layer(dtype: str, **scales: torch.Tensor) -> Any:
    one = torch.ones(())
    return SimpleNamespace(
        impl=SimpleNamespace(),
        get_attn_backend=lambda: SimpleNamespace(get_name=lambda: "FLASH_ATTN"),
        kv_cache_dtype=dtype,
        **{"_q_scale": one, "_k_scale": one, "_v_scale": one, **scales},
    )


def test_layers_once_they_are_built() -> None:
    for dtype in ("auto", "bfloat16", *FP8):
        check_layer("layers.1", layer(dtype))
    with pytest.raises(UnsupportedModelError, match=r"layers\.1 has a quantised KV cache \(nvfp4"):
        check_layer("layers.1", layer("nvfp4"))
    for name in ("_q_scale", "_k_scale", "_v_scale"):
        with pytest.raises(UnsupportedModelError, match="layers.1 has a cache scale for every"):
            check_layer("layers.1", layer("fp8", **{name: torch.ones(8)}))
    check_layer("layers.1", layer("auto", _k_scale=torch.ones(8)))  # nobody multiplies by it


REWRITING = [
    ("spindlekv", r"^codebook: .*8 bits.*leave codebook out, or set --kv-cache-dtype auto\."),
    ("streaming_llm_rerotated", r"^policy\.name: streaming_llm turns .*--kv-cache-dtype auto\."),
]


@pytest.mark.parametrize(("preset", "words"), REWRITING)
def test_settings_that_rewrite_rows(config, probe_model: str, preset: str, words: str) -> None:
    """Of the server: before anything is loaded. Also where one task alone has them."""
    own = {"policy": {"name": "streaming_llm", "rerotate_keys": True}}
    own = {"codebook": {"shallow": 0.5}} if preset == "spindlekv" else own
    tasks = {"localization": {}, "aggregation": own}
    for setting in (preset, {"preset": "snapkv", "tasks": tasks}):
        arguments: dict[str, Any] = {"additional_config": {CONFIG_KEY: setting}}
        args = EngineArgs(model=probe_model, dtype="float32", kv_cache_dtype="fp8", **arguments)
        with pytest.raises(ConfigError, match=words):
            args.create_engine_config()
        EngineArgs(model=probe_model, dtype="float32", **arguments).create_engine_config()


@pytest.mark.parametrize(("preset", "words"), REWRITING)
def test_requests_that_would_rewrite_rows_get_http_400(config, preset: str, words: str) -> None:
    for fine in ("none", "snapkv", "keydiff"):
        check_request(config, incoming({"kv_compression": fine}, [1] * 9))
    with pytest.raises(VLLMValidationError, match=words):
        check_request(config, incoming({"kv_compression": preset}, [1] * 9))

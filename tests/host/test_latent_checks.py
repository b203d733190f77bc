"""Latent attention (MLA): which models, options and settings are refused, each in one sentence."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

from lab.random_models import write_random_model
from tests.host.requests import incoming
from tests.host.test_checks import Overlay
from vllm_kvcompress.config.reading import parse_config, preset_names
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.host.checks import check_config, check_setting
from vllm_kvcompress.host.hooks import install_hooks
from vllm_kvcompress.host.request_checks import check_request
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.registry import load_policy_class, policy_names

SERVED = {
    "cake", "chunkkv", "keydiff", "knorm", "random", "rkv", "snapkv", "spindlekv", "streaming_llm",
    "tova", "windowkv",
}  # fmt: skip
OBSTACLES = {
    "adakv": "adakv shares a budget out between KV heads",
    "criticalkv": "criticalkv weighs values",
    "expected_attention": "expected_attention turns whole queries",
    "h2o": "h2o reads the queries of the whole prompt",
    "lagkv": "lagkv compares values",
    "spindlekv": "codebook: ",  # the preset; the policy alone is served
    "streaming_llm_rerotated": "streaming_llm turns whole keys",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_random_model(tmp_path_factory.mktemp("deepseek"), "deepseek_v3"))


@pytest.fixture(scope="module")
def config(model: str) -> Any:
    """A real configuration of a model with MLA, which every check accepts."""
    install_hooks()
    args = EngineArgs(model=model, dtype="float32", skip_tokenizer_init=True)
    found = args.create_engine_config()
    assert found.model_config.use_mla
    check_config(found)
    return found


TEXT = {"num_hidden_layers": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
MODEL = "model_config"
REFUSALS: list[tuple[str, str | None, dict[str, Any], list[str]]] = [
    (
        "DeepSeek V3.2",
        MODEL,
        {"hf_text_config": SimpleNamespace(**TEXT, model_type="deepseek_v32", index_topk=2048)},
        ["sparse latent attention", "indexer", "choose another model"],
    ),
    (
        "GLM-5",
        MODEL,
        {"hf_text_config": SimpleNamespace(**TEXT, model_type="glm_moe_dsa", index_topk=2048)},
        ["sparse latent attention"],
    ),
    (
        "LongCat",
        MODEL,
        {"hf_text_config": SimpleNamespace(**TEXT, model_type="longcat_flash")},
        ["of the kind longcat_flash", "served are deepseek_v2, deepseek_v3, glm4_moe_lite, kim"],
    ),
    (
        "Transformers backend",
        MODEL,
        {"using_transformers_backend": lambda: True},
        ["Transformers backend", "--model-impl vllm"],
    ),
    (
        "cache",
        "cache_config",
        {"cache_dtype": "fp8_ds_mla"},
        ["fp8_ds_mla", "--kv-cache-dtype bfloat16"],
    ),
    (
        "scheme",
        None,
        {"quant_config": SimpleNamespace(kv_cache_scheme={"num_bits": 8})},
        ["quantised cache (of the checkpoint)", "--kv-cache-dtype bfloat16"],
    ),
    (
        "stages",
        "parallel_config",
        {"pipeline_parallel_size": 2},
        ["--pipeline-parallel-size 2 with latent attention", "set it to 1"],
    ),
    (
        "drafts",
        None,
        {"speculative_config": SimpleNamespace(method="ngram")},
        ["speculative decoding", "remove --speculative-config"],
    ),
]


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [each[1:] for each in REFUSALS],
    ids=[each[0] for each in REFUSALS],
)
def test_what_is_not_served(config, part: str | None, changes: dict, words: list[str]) -> None:
    changed = changes if part is None else {part: Overlay(getattr(config, part), changes)}
    with pytest.raises(UnsupportedModelError) as caught:
        check_config(Overlay(config, changed))
    message = str(caught.value)
    assert message.startswith("--kv-compression: ") and "\n" not in message
    assert message.endswith("drop --kv-compression.")
    for word in words:
        assert word in message


def test_every_preset_is_served_or_refused_before_a_weight_is_loaded(config, model: str) -> None:
    refused = set()
    for name in preset_names():
        setting = parse_config(name)
        assert setting is not None
        if name in OBSTACLES:
            with pytest.raises(ConfigError) as caught:
                check_setting(setting, config)
            message = str(caught.value)
            assert OBSTACLES[name] in message and "\n" not in message and "MLA" in message
            refused.add(name)
        else:
            check_setting(setting, config)
    assert refused == OBSTACLES.keys()


def test_the_sentence_names_what_works(config) -> None:
    with pytest.raises(ConfigError) as caught:
        check_setting(parse_config("lagkv"), config)
    named = str(caught.value).partition("choose one of ")[2].rstrip(".").split(", ")
    assert set(named) == SERVED
    for name in policy_names():
        policy: Any = load_policy_class(name)()
        assert (policy.latent_obstacle is None) == (name in SERVED), name


def test_a_wrapped_policy_brings_its_obstacle(config) -> None:
    setting = {"preset": "chunkkv", "policy": {"scorer": {"name": "lagkv"}}}
    with pytest.raises(ConfigError, match=r"chunkkv compares values"):
        check_setting(parse_config(setting), config)


def test_a_policy_that_says_nothing_is_refused() -> None:
    class Somebodys(Policy):
        def score(self, inputs: Any) -> Any:
            raise NotImplementedError

    assert Somebodys().latent_obstacle == "does not say that it serves latent attention"


def test_drafts_are_refused(config) -> None:
    setting = parse_config({"preset": "snapkv", "mode": "draft"})
    with pytest.raises(ConfigError, match=r"mode: .*latent attention \(MLA\).*leave out draft"):
        check_setting(setting, config)


def test_the_server_refuses_with_its_setting(model: str) -> None:
    install_hooks()
    args = EngineArgs(
        model=model, dtype="float32", skip_tokenizer_init=True,
        additional_config={"kv_compression": "criticalkv"},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"criticalkv weighs values"):
        args.create_engine_config()


def test_a_request_is_refused_at_admission(model: str) -> None:
    install_hooks()
    args = EngineArgs(
        model=model, dtype="float32", skip_tokenizer_init=True,
        additional_config={"kv_compression": "snapkv"},
    )  # fmt: skip
    config = args.create_engine_config()
    check_request(config, incoming({"kv_compression": "keydiff"}, list(range(600))))
    with pytest.raises(VLLMValidationError, match=r"lagkv compares values"):
        check_request(config, incoming({"kv_compression": "lagkv"}, list(range(600))))

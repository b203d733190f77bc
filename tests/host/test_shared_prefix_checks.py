"""`kv_shared_prefix`: what may be written, and what is refused before the engine sees it."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Gemma2Config, LlamaConfig
from vllm.exceptions import VLLMValidationError

from tests.host.requests import incoming
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.host.checks import check_reuse
from vllm_kvcompress.host.request_checks import check_request
from vllm_kvcompress.lengths.budgets import budget_tokens
from vllm_kvcompress.request_options import check_fits_server, parse_request, resolve_request

KEY = "kv_shared_prefix"


@pytest.mark.parametrize(("number", "blocks"), [(1, 0), (32, 32), (100, 96), (96.0, 96)])
def test_a_number_of_tokens_counts_in_whole_blocks(number: float, blocks: int) -> None:
    options = parse_request({KEY: number}, 100)
    assert options.shared_prefix == number and options.shared_len(32) == blocks
    assert parse_request({}).shared_len(32) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "a whole number from 1 up"),
        (-3, "a whole number from 1 up"),
        (1.5, "a whole number from 1 up"),
        (101, r"101 tokens, and the prompt has 100"),
        ("100", "expected a number"),
        (True, "expected a number"),
        ([100], "expected a number"),
        (float("inf"), "expected a finite number"),
    ],
)
def test_other_values_are_refused(value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"{KEY}: .*{words}"):
        parse_request({KEY: value}, 100)


def test_a_request_is_a_turn_or_shares_a_prefix() -> None:
    with pytest.raises(ConfigError, match="kv_session, kv_shared_prefix: set only one of the two"):
        parse_request({KEY: 10, "kv_session": "a"})
    with pytest.raises(ConfigError, match="kv_shared: unknown key.*kv_shared_prefix"):
        parse_request({"kv_shared": 10})


@pytest.mark.parametrize("preset", ["snapkv", "auto", "windowkv", "tova", "h2o", "chunkkv"])
def test_policies_that_read_queries_are_refused(preset: str) -> None:
    for server, xargs in ((preset, {}), ("keydiff", {"kv_compression": preset})):
        config = parse_config(server)
        assert config is not None
        with pytest.raises(ConfigError, match=f"{KEY}: .* ranks tokens by queries") as found:
            check_fits_server(config, parse_request({KEY: 900, **xargs}))
        named = "knorm, lagkv, random, shared_prefix, streaming_llm, streaming_llm_rerotated"
        assert f"kv_compression: keydiff, {named}; or" in str(found.value)
        check_fits_server(config, parse_request({KEY: 900, "kv_compression": "lagkv"}))
        check_fits_server(config, parse_request({KEY: 900, "kv_compression": "none"}))


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"preset": "keydiff", "sessions": {"max_blocks_ratio": 0}}, "keeps nothing for others"),
        ({"preset": "keydiff", "mode": "draft"}, "drafts over views"),
        ({"preset": "keydiff", "codebook": {"shallow": 0.25}}, "codebooks are made when a prompt"),
    ],
)
def test_settings_that_cannot_be_shared(server: dict[str, Any], words: str) -> None:
    config = parse_config(server)
    assert config is not None
    with pytest.raises(ConfigError, match=f"{KEY}: .*{words}.*leave it out"):
        check_fits_server(config, parse_request({KEY: 900}))
    check_fits_server(config, parse_request(None))


@pytest.mark.parametrize(
    ("trigger", "expected"),
    [
        ("end_of_prompt", "end_of_prompt"),
        ("both", "end_of_prompt"),
        ("interval", "end_of_prompt"),
        ("pressure", "end_of_prompt"),
        ("prompt", "prompt"),
        ("all", "prompt"),
    ],
)
def test_a_prefix_is_compressed_where_it_ends(trigger: str, expected: str) -> None:
    server = parse_config({"preset": "shared_prefix", "trigger": trigger})
    assert server is not None
    config = resolve_request(server, parse_request({KEY: 900}))
    assert config is not None and config.trigger == expected
    assert budget_tokens(896, config) == 224
    assert resolve_request(server, parse_request(None)) == server


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_mla": True}, r"multi-head latent attention \(MLA\)"),
        ({"is_hybrid": True}, "recurrent layers"),
        ({"hf_text_config": Gemma2Config()}, "windowed layers"),
    ],
)
def test_models_of_which_no_cache_is_kept(config: dict[str, Any], words: str) -> None:
    kinds = {"use_mla": False, "is_hybrid": False, "hf_text_config": LlamaConfig(), **config}
    model = SimpleNamespace(model="org/model", max_model_len=8192, **kinds)
    engine = SimpleNamespace(model_config=model, speculative_config=None)
    check_reuse(engine, parse_request(None))
    with pytest.raises(ConfigError, match=f"{KEY}: org/model runs with {words}.*for others"):
        check_reuse(engine, parse_request({KEY: 900}))


def test_the_server_answers_400() -> None:
    """Whether it compresses or not, and for a stream of inputs."""
    stock = SimpleNamespace(additional_config={})
    with pytest.raises(VLLMValidationError, match=f"{KEY}: this server was started without"):
        check_request(stock, incoming({KEY: 2}, [1, 2, 3]))
    with pytest.raises(VLLMValidationError, match=f"{KEY}: 4 tokens, and the prompt has 3"):
        check_request(stock, incoming({KEY: 4}, [1, 2, 3]))
    with pytest.raises(VLLMValidationError, match=f"{KEY}: a streaming session is never"):
        check_request(stock, incoming({KEY: 2}, [1, 2, 3], resumable=True))

"""`kv_session`: what may be written, and what is refused before the engine takes a request."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig
from vllm.exceptions import VLLMValidationError

from tests.host.requests import incoming
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.host.checks import check_reuse
from vllm_kvcompress.host.request_checks import check_request
from vllm_kvcompress.request_options import check_fits_server, parse_request

SESSION = parse_request({"kv_session": "a"})


@pytest.mark.parametrize("name", ["a", "x" * 128, "none", "Zoë / 7"])
def test_a_name_is_any_text_of_up_to_128_characters(name: str) -> None:
    assert parse_request({"kv_session": name}).session == name
    assert parse_request({}).session is None


@pytest.mark.parametrize("name", ["", "x" * 129, 7, True, ["a"], 1.5])
def test_other_values_are_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="kv_session: expected a text of 1 to 128 characters"):
        parse_request({"kv_session": name})


@pytest.mark.parametrize(
    ("server", "xargs", "words"),
    [
        ({"preset": "auto", "sessions": {"max_blocks_ratio": 0}}, {}, "keeps nothing between"),
        ({"preset": "snapkv", "mode": "draft"}, {}, "drafts over views"),
        ({"preset": "spindlekv"}, {}, "codebooks are made when a prompt ends"),
        ({"preset": "auto"}, {"kv_compression": "spindlekv"}, "codebooks are made"),
        ({"preset": "auto"}, {"kv_compression": "spindlekv-evict"}, "spindlekv scores whole"),
        ({"preset": "snapkv", "trigger": "pressure"}, {}, "trigger pressure a conversation"),
        ({"preset": "h2o"}, {}, "h2o scores whole prompts"),
        ({"preset": "expected_attention"}, {}, "expected_attention scores whole prompts"),
    ],
)
def test_settings_that_cannot_be_continued(
    server: dict[str, Any], xargs: dict[str, Any], words: str
) -> None:
    config = parse_config(server)
    assert config is not None
    with pytest.raises(ConfigError, match=f"kv_session: .*{words}.*leave it out"):
        check_fits_server(config, parse_request({"kv_session": "a", **xargs}))
    check_fits_server(config, parse_request(xargs))


def test_a_preset_of_a_request_brings_no_switch_of_its_own() -> None:
    config = parse_config({"preset": "auto", "sessions": {"max_blocks_ratio": 0}})
    with pytest.raises(ConfigError, match="keeps nothing"):
        check_fits_server(config, parse_request({"kv_session": "a", "kv_compression": "snapkv"}))
    check_fits_server(
        parse_config("auto"), parse_request({"kv_session": "a", "kv_compression": "none"})
    )


def engine(text: Any, **options: Any) -> Any:
    """A ``VllmConfig`` as far as it matters here."""
    kinds = {"use_mla": False, "is_hybrid": False} | options
    speculative = kinds.pop("speculative_config", None)
    model = SimpleNamespace(model="org/model", hf_text_config=text, max_model_len=8192, **kinds)
    return SimpleNamespace(model_config=model, speculative_config=speculative)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (engine(LlamaConfig(), use_mla=True), r"multi-head latent attention \(MLA\)"),
        (engine(LlamaConfig(), is_hybrid=True), "recurrent layers"),
        (engine(Gemma2Config()), "windowed layers"),
        (
            engine(LlamaConfig(), speculative_config=SimpleNamespace(method="eagle")),
            r"a drafter with a cache of its own \(eagle\)",
        ),
    ],
)
def test_models_of_which_no_cache_is_kept(config: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"kv_session: org/model runs with {words}.*leave it out"):
        check_reuse(config, SESSION)


def test_full_attention_and_drafters_without_layers_are_served() -> None:
    check_reuse(engine(LlamaConfig()), SESSION)
    drafter = SimpleNamespace(method="ngram")
    check_reuse(engine(LlamaConfig(), speculative_config=drafter), SESSION)


def test_the_server_answers_400() -> None:
    """Whether it compresses or not, and for a stream of inputs."""
    stock = SimpleNamespace(additional_config={})
    with pytest.raises(VLLMValidationError, match="kv_session: this server was started without"):
        check_request(stock, incoming({"kv_session": "none"}, [1, 2, 3]))
    with pytest.raises(VLLMValidationError, match="kv_session: a streaming session is never"):
        check_request(stock, incoming({"kv_session": "a"}, [1, 2, 3], resumable=True))
    with pytest.raises(VLLMValidationError, match="kv_session: expected a text"):
        check_request(stock, incoming({"kv_session": 3}, [1, 2, 3]))
    own = {"kv_compression": parse_config("auto").to_dict()}
    served = engine(Gemma2Config())
    served.additional_config = own
    with pytest.raises(VLLMValidationError, match="runs with windowed layers"):
        check_request(served, incoming({"kv_session": "a"}, [1, 2, 3]))


def test_a_prompt_of_embeddings_has_a_length() -> None:
    """Pins beyond it were let through, and the request served uncompressed."""
    request = incoming({"kv_pin": [0, 9]}, [])
    request.prompt_token_ids, request.prompt_embeds = None, torch.zeros(4, 8)
    with pytest.raises(VLLMValidationError, match=r"kv_pin: \[0, 9\] must .* 4 \(its length\)"):
        check_request(SimpleNamespace(additional_config={}), request)

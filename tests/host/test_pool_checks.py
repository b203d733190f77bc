"""Prompts that a pool cannot hold: which are refused, and what the client is told."""

from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

from tests.host.requests import incoming
from tests.host.test_checks import Overlay
from vllm_kvcompress.config.reading import CONFIG_KEY
from vllm_kvcompress.host.hooks import install_hooks
from vllm_kvcompress.host.request_checks import check_request

INSIDE = {
    "preset": "snapkv",
    "trigger": "prompt",
    "prompt_interval": 256,
    "budget": {"tokens": 128},
}
PROMPT = [1] * 1500


def server(probe_model: str, num_blocks: int | None, **setting: Any) -> Any:
    """A configuration as an API server has it, once its engine has told it of the pool."""
    install_hooks()
    args: dict[str, Any] = {"additional_config": {CONFIG_KEY: {**INSIDE, **setting}}}
    config = EngineArgs(model=probe_model, dtype="float32", **args).create_engine_config()
    config.cache_config.num_gpu_blocks = num_blocks
    return config


def test_a_prompt_that_is_compressed_on_its_way_fits(probe_model: str) -> None:
    config = server(probe_model, 20)  # 128 and 256 tokens, and part of a block: 13 blocks
    check_request(config, incoming(None, PROMPT))
    check_request(config, incoming({"kv_budget_tokens": 300}, PROMPT))


@pytest.mark.parametrize(
    ("extra", "needed", "longest"),
    [
        ({"kv_compression": "none"}, 47, 607),
        ({"kv_compression": "snapkv"}, 47, 608),  # from the end of the prompt on
        ({"kv_budget_tokens": 900}, 37, 607),
        ({"kv_budget_ratio": 0.5}, 32, None),
    ],
)
def test_one_that_asks_for_more_is_refused(
    probe_model: str, extra: dict[str, Any], needed: int, longest: int | None
) -> None:
    config = server(probe_model, 20)
    with pytest.raises(VLLMValidationError, match=f"1500 tokens and needs {needed} KV") as caught:
        check_request(config, incoming(extra, PROMPT))
    assert "this server has 19" in str(caught.value)
    if longest is not None:
        assert f"Prompts of up to {longest} tokens" in str(caught.value)
        check_request(config, incoming(extra, [1] * longest))
        with pytest.raises(VLLMValidationError):
            check_request(config, incoming(extra, [1] * (longest + 1)))


def test_a_streaming_session_keeps_all_of_it(probe_model: str) -> None:
    config = server(probe_model, 20)
    with pytest.raises(VLLMValidationError, match="streaming session"):
        check_request(config, incoming(None, PROMPT, resumable=True))
    check_request(config, incoming(None, PROMPT[:500], resumable=True))


def test_layer_groups_have_tables_of_their_own(probe_model: str) -> None:
    two = {"layer_groups": {"count": 2}}
    check_request(server(probe_model, 27, **two), incoming(None, PROMPT))
    with pytest.raises(VLLMValidationError, match=r"needs 26 .* has 25"):
        check_request(server(probe_model, 26, **two), incoming(None, PROMPT))


def test_every_shorter_prompt_fits_too(probe_model: str) -> None:
    """Though one may need a block more than one that is a little longer."""
    config, asked = server(probe_model, 20), {"kv_budget_ratio": 0.25}
    with pytest.raises(VLLMValidationError, match="Prompts of up to") as caught:
        check_request(config, incoming(asked, [1] * 4000))
    longest = int(str(caught.value).split("Prompts of up to ")[1].split()[0])
    assert longest > 1000
    for length in range(longest - 40, longest + 1):
        check_request(config, incoming(asked, [1] * length))


def test_engines_share_what_this_process_counts(probe_model: str) -> None:
    config = server(probe_model, 40)
    parallel = Overlay(config.parallel_config, {"data_parallel_size": 2})
    both = Overlay(config, {"parallel_config": parallel})
    with pytest.raises(VLLMValidationError, match="has 19"):
        check_request(both, incoming({"kv_compression": "none"}, PROMPT))


@pytest.mark.parametrize("case", ["untold", "end_of_prompt", "one task"])
def test_nothing_is_refused_where_vllm_has_made_sure(probe_model: str, case: str) -> None:
    """Nobody told the size of the pool, or it holds the longest sequence whole."""
    config = {
        "untold": lambda: server(probe_model, None),
        "end_of_prompt": lambda: server(
            probe_model, 20, trigger="end_of_prompt", prompt_interval=2048
        ),
        "one task": lambda: server(
            probe_model, 20, tasks={"localization": {}, "aggregation": {"trigger": "both"}}
        ),
    }[case]()
    check_request(config, incoming({"kv_compression": "none"}, PROMPT))

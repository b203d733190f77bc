"""Refuses a request before the engine takes it; the server answers HTTP 400."""

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.utils import length_from_prompt_token_ids_or_embeds

from vllm_kvcompress.config.reading import NONE, server_setting
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError, config_error
from vllm_kvcompress.host.checks import check_reuse, check_setting
from vllm_kvcompress.host.pool_checks import check_pool
from vllm_kvcompress.plans import RequestOptions
from vllm_kvcompress.request_options import (
    REQUEST_KEYS,
    check_fits_server,
    named_config,
    parse_request,
)


def check_request(vllm_config: Any, request: Any) -> None:
    """Refuse bad ``vllm_xargs``, and prompts that the pool cannot hold.

    Parameters
    ----------
    vllm_config : VllmConfig
        vLLM's.
    request : EngineCoreRequest
        As the API server sends it to the engine.

    Raises
    ------
    VLLMValidationError
        With the first reason found.
    """
    server = server_setting(vllm_config.additional_config)
    num_tokens = _prompt_len(request)
    extra = getattr(request.sampling_params, "extra_args", None)
    options = RequestOptions()
    if extra:
        try:
            options = _read_options(vllm_config, server, extra, request.resumable, num_tokens)
        except ConfigError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
    if server is None or request.sampling_params is None:
        return
    assert num_tokens is not None, "a request that samples has a prompt"
    try:
        check_pool(vllm_config, server, options, num_tokens, request.resumable)
    except ConfigError as error:
        what = {"parameter": "input_tokens", "value": num_tokens}
        raise VLLMValidationError(str(error), **what) from None


def _prompt_len(request: Any) -> int | None:
    """Tokens of the prompt, which may be embeddings; None where a request has neither."""
    if request.prompt_token_ids is None and request.prompt_embeds is None:
        return None
    prompt = request.prompt_token_ids, request.prompt_embeds
    return length_from_prompt_token_ids_or_embeds(*prompt)


def _read_options(
    vllm_config: Any,
    server: CompressionConfig | None,
    extra: dict[str, Any],
    is_session: bool,
    prompt_len: int | None,
) -> RequestOptions:
    off = "kv_compression", NONE
    ours = [key for key in REQUEST_KEYS if key in extra and (key, extra[key]) != off]
    options = parse_request(extra, prompt_len)
    if options.pins and is_session:
        raise ConfigError(
            "kv_pin: a streaming session is never compressed, so there is nothing to pin; "
            "leave it out."
        )
    if options.session is not None and is_session:
        raise ConfigError(
            "kv_session: a streaming session is never compressed, so there is nothing to continue; "
            "leave it out."
        )
    if options.shared_prefix is not None and is_session:
        raise ConfigError(
            "kv_shared_prefix: a streaming session is never compressed, so there is nothing to "
            "share; leave it out."
        )
    odd = [key for key in extra if not isinstance(key, str)]
    if odd and server is not None:
        # msgspec would end the engine's input thread: every later request would wait for ever.
        raise config_error("extra_args", "", "a key must be a text", odd[0])
    if ours and server is None:
        raise ConfigError(f"{ours[0]}: this server was started without --kv-compression.")
    if ours:
        assert server is not None
        check_fits_server(server, options)
        check_reuse(vllm_config, options)
        if (named := named_config(server, options)) is not None and named is not server:
            check_setting(named, vllm_config)
    return options

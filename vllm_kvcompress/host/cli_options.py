"""The options that ``vllm serve`` has from us, on their way into vLLM's ``--additional-config``."""

import sys
from typing import Any, NoReturn

from vllm_kvcompress.config.merging import merge_fields
from vllm_kvcompress.config.reading import CONFIG_KEY, NONE, parse_config, parse_json
from vllm_kvcompress.errors import ConfigError


def move_to_additional_config(args: Any) -> None:
    """Turn our options into a field of vLLM's own --additional-config, and take them out.

    The arguments go on to the processes of --api-server-count, which read them before they load
    plugins: there nobody would look at options of ours.
    """
    preset = getattr(args, "kv_compression", NONE)
    text = getattr(args, "kv_compression_config", None)
    try:
        overrides = parse_json(text) if isinstance(text, str) else text
        config = parse_config(preset, _with_mode(overrides, args, preset))
        if config is None:
            return
        additional = dict(args.additional_config or {})
        if CONFIG_KEY in additional:
            raise ConfigError(
                "--kv-compression and --additional-config both set kv_compression: "
                "keep one of the two."
            )
    except ConfigError as error:
        exit_with(error)
    args.additional_config = {**additional, CONFIG_KEY: config.to_dict()}
    args.kv_compression = NONE
    args.kv_compression_config = args.kv_compression_mode = args.kv_draft_tokens = None


def exit_with(error: Exception) -> NoReturn:
    """End the program with one sentence."""
    sys.exit(f"vllm: error: {error}")


def _with_mode(overrides: dict[str, Any] | None, args: Any, preset: str) -> dict[str, Any] | None:
    """Overrides with what --kv-compression-mode and --kv-draft-tokens lay over them."""
    mode = getattr(args, "kv_compression_mode", None)
    tokens = getattr(args, "kv_draft_tokens", None)
    if mode is None and tokens is None:
        return overrides
    option = "--kv-compression-mode" if mode is not None else "--kv-draft-tokens"
    if preset == NONE:
        raise ConfigError(f"{option}: needs --kv-compression PRESET, whose budget a view has.")
    overrides = overrides or {}
    fields: dict[str, Any] = {}
    if mode is not None:
        _refuse_twice(option, "mode", overrides)
        fields["mode"] = mode
    if tokens is not None:
        draft = overrides.get("draft", {})
        if not isinstance(draft, dict):
            return overrides  # refused with the rest
        _refuse_twice("--kv-draft-tokens", "tokens", draft)
        fields["draft"] = {"tokens": tokens}
    return merge_fields(overrides, fields)


def _refuse_twice(option: str, name: str, fields: dict[str, Any]) -> None:
    if name in fields:
        raise ConfigError(f"{option}: --kv-compression-config sets {name}, too; keep one of them.")

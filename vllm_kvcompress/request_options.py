"""What one request asks for in ``vllm_xargs``, and the setting it runs under.

API server, scheduler and worker all read the same keys with the functions below.
"""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from vllm_kvcompress.config import (
    NONE,
    BudgetConfig,
    CompressionConfig,
    did_you_mean,
    parse_config,
    preset_names,
)
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.plans import RequestOptions

REQUEST_KEYS = ("kv_compression", "kv_budget_ratio", "kv_budget_tokens", "kv_pin")
_PREFIXES = ("kv_compression", "kv_budget", "kv_pin")


@cache
def _cached_preset(name: str) -> CompressionConfig:
    config = parse_config(name)
    assert config is not None
    return config


def _number(extra: Mapping[str, Any], key: str) -> float | None:
    value = extra.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key}: expected a number, got {value!r}.")
    if not math.isfinite(value):  # JSON's 1e999 arrives as infinity
        raise ConfigError(f"{key}: expected a finite number, got {value}.")
    return value


def _pins(value: Any, prompt_len: int | None) -> tuple[tuple[int, int], ...]:
    if value is None:
        return ()
    rule = "kv_pin: expected a list [start, end, start, end, ...] of prompt positions"
    if not isinstance(value, list | tuple) or len(value) % 2:
        raise ConfigError(f"{rule}, got {value!r}.")
    if not all(isinstance(x, int) and not isinstance(x, bool) for x in value):
        raise ConfigError(f"{rule}, all whole numbers, got {value!r}.")
    pins = tuple(zip(value[::2], value[1::2], strict=True))
    for start, end in pins:
        if not 0 <= start < end or (prompt_len is not None and end > prompt_len):
            top = "the prompt's length" if prompt_len is None else f"{prompt_len} (its length)"
            raise ConfigError(f"kv_pin: [{start}, {end}) must satisfy 0 <= start < end <= {top}.")
    return pins


def parse_request(
    extra_args: Mapping[str, Any] | None, prompt_len: int | None = None
) -> RequestOptions:
    """Read one request's ``vllm_xargs``.

    Parameters
    ----------
    extra_args : mapping or None
        ``SamplingParams.extra_args``; keys that are not ours are ignored.
    prompt_len : int or None
        Tokens of the prompt; None skips the check of pins against it.

    Raises
    ------
    ConfigError
        One sentence that names the key and says what is allowed.
    """
    extra = extra_args or {}
    for key in extra:
        if key.startswith(_PREFIXES) and key not in REQUEST_KEYS:
            hint = did_you_mean(key, list(REQUEST_KEYS))
            raise ConfigError(f"{key}: unknown key{hint}; allowed are {', '.join(REQUEST_KEYS)}.")
    preset = extra.get("kv_compression")
    if preset is not None and preset != NONE and preset not in preset_names():
        raise ConfigError(
            f"kv_compression: there is no preset {preset!r}; allowed are none, "
            f"{', '.join(preset_names())}."
        )
    ratio, tokens = _number(extra, "kv_budget_ratio"), _number(extra, "kv_budget_tokens")
    if ratio is not None and tokens is not None:
        raise ConfigError("kv_budget_ratio, kv_budget_tokens: set only one of the two.")
    if ratio is not None and not 0 < ratio <= 1:
        raise ConfigError(f"kv_budget_ratio: must be greater than 0 and at most 1, got {ratio}.")
    if tokens is not None and (tokens != int(tokens) or tokens < 1):
        raise ConfigError(f"kv_budget_tokens: must be a whole number from 1 up, got {tokens}.")
    return RequestOptions(
        preset=preset,
        budget_ratio=None if ratio is None else float(ratio),
        budget_tokens=None if tokens is None else int(tokens),
        pins=_pins(extra.get("kv_pin"), prompt_len),
    )


def resolve_request(server: CompressionConfig, options: RequestOptions) -> CompressionConfig | None:
    """The configuration one request runs under; None when it opted out.

    The request's pins come on top of the configured ones. Layer groups are always the server's:
    they are block tables, made once.
    """
    if options.preset == NONE:
        return None
    config = _cached_preset(options.preset) if options.preset is not None else server
    update: dict[str, Any] = {}
    if options.budget_ratio is not None:
        update["budget"] = BudgetConfig(ratio=options.budget_ratio, floor=config.budget.floor)
    if options.budget_tokens is not None:
        update["budget"] = BudgetConfig(tokens=options.budget_tokens, floor=config.budget.floor)
    if options.pins:
        update["pinned"] = (*config.pinned, *(list(pin) for pin in options.pins))
    return config.model_copy(update=update) if update else config

"""What one request asks for in ``vllm_xargs``, and the setting it runs under.

The API server refuses what is wrong, the scheduler decides; workers are told (messages.py).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from vllm_kvcompress.config.reading import NONE, preset, preset_names
from vllm_kvcompress.config.settings import BudgetConfig, CompressionConfig
from vllm_kvcompress.errors import ConfigError, config_error, did_you_mean
from vllm_kvcompress.lengths.decode_queries import decode_window
from vllm_kvcompress.lengths.shared import setting_of_prefix
from vllm_kvcompress.plans import RequestOptions
from vllm_kvcompress.reuse_checks import check_session, check_shared_prefix

REQUEST_KEYS = (
    "kv_compression", "kv_budget_ratio", "kv_budget_tokens", "kv_pin", "kv_task", "kv_draft_tokens",
    "kv_session", "kv_shared_prefix",
)  # fmt: skip
_PREFIXES = (
    "kv_compression", "kv_budget", "kv_pin", "kv_task", "kv_draft", "kv_session", "kv_shared",
)  # fmt: skip
TASKS = ("localization", "aggregation")

MAX_SESSION_LEN = 128
"""Characters of a conversation's name."""

MAX_PINS = 256
"""Ranges of ``kv_pin``: a compaction goes through them for every layer group, and with thousands of
them a long prompt would hold up the others for seconds."""

_LIMIT = 2**63  # of numbers: more than any tensor's length or position


def _number(extra: Mapping[str, Any], key: str) -> float | None:
    value = extra.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise config_error(key, "", "expected a number", value)
    # JSON's 1e999 arrives as infinity, and 10**400 as a whole number that no float holds.
    if isinstance(value, float) and not math.isfinite(value):
        raise config_error(key, "", "expected a finite number", value)
    if abs(value) >= _LIMIT:
        raise config_error(key, "", "expected a number below 2**63", value)
    return value


def _whole_number(extra: Mapping[str, Any], key: str, smallest: int) -> int | None:
    value = _number(extra, key)
    if value is None:
        return None
    if value != int(value) or value < smallest:
        raise config_error(key, "", f"must be a whole number from {smallest} up", value)
    return int(value)


def _choice(extra: Mapping[str, Any], key: str, allowed: list[str], rule: str) -> str | None:
    """One of a few words; a name is compared with these and goes nowhere else."""
    value = extra.get(key)
    if value is None or (isinstance(value, str) and value in allowed):
        return value
    raise config_error(key, "", rule, value)


def _name(extra: Mapping[str, Any], key: str) -> str | None:
    """A text that the client chose, and that is compared with others and goes nowhere else."""
    value = extra.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= MAX_SESSION_LEN:
        raise config_error(key, "", f"expected a text of 1 to {MAX_SESSION_LEN} characters", value)
    try:
        value.encode()  # as it is sent to the engine
    except UnicodeEncodeError:
        raise config_error(key, "", "not valid Unicode", value) from None
    return value


def _pins(value: Any, prompt_len: int | None) -> tuple[tuple[int, int], ...]:
    if value is None:
        return ()
    rule = "expected a list [start, end, start, end, ...] of prompt positions"
    if not isinstance(value, list | tuple) or len(value) % 2:
        raise config_error("kv_pin", "", rule, value)
    if len(value) > 2 * MAX_PINS:
        many = f"at most {MAX_PINS} ranges, got {len(value) // 2}"
        raise config_error("kv_pin", "", f"{many}; pin longer ones, or set a larger budget")
    if not all(isinstance(x, int) and not isinstance(x, bool) for x in value):
        raise config_error("kv_pin", "", f"{rule}, all whole numbers", value)
    pins = tuple(zip(value[::2], value[1::2], strict=True))
    longest = _LIMIT if prompt_len is None else prompt_len
    for start, end in pins:
        if not 0 <= start < end <= longest:
            top = "the prompt's length" if prompt_len is None else f"{prompt_len} (its length)"
            rule = f"{{got}} must satisfy 0 <= start < end <= {top}"
            raise config_error("kv_pin", "", rule, [start, end])
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
    extra = {} if extra_args is None else extra_args
    if not isinstance(extra, Mapping):
        raise config_error("vllm_xargs", "", "expected keys and values", extra)
    for key in extra:
        ours = isinstance(key, str) and key.startswith(_PREFIXES)
        if ours and key not in REQUEST_KEYS:
            hint = did_you_mean(key, list(REQUEST_KEYS))
            rule = f"unknown key{hint}; allowed are {', '.join(REQUEST_KEYS)}"
            raise config_error(key, "", rule)
    presets = [NONE, *preset_names()]
    rule = f"there is no preset {{got}}; allowed are {', '.join(presets)}"
    name = _choice(extra, "kv_compression", presets, rule)
    ratio, tokens = _number(extra, "kv_budget_ratio"), _whole_number(extra, "kv_budget_tokens", 1)
    if ratio is not None and tokens is not None:
        raise ConfigError("kv_budget_ratio, kv_budget_tokens: set only one of the two.")
    if ratio is not None and not 0 < ratio <= 1:
        rule = "must be greater than 0 and at most 1"
        raise config_error("kv_budget_ratio", "", rule, ratio)
    session = _name(extra, "kv_session")
    shared_prefix = _whole_number(extra, "kv_shared_prefix", 1)
    if session is not None and shared_prefix is not None:
        raise ConfigError("kv_session, kv_shared_prefix: set only one of the two.")
    if shared_prefix is not None and prompt_len is not None and shared_prefix > prompt_len:
        rule = f"{{got}} tokens, and the prompt has {prompt_len}"
        raise config_error("kv_shared_prefix", "", rule, shared_prefix)
    rule = f"must be auto, {' or '.join(TASKS)}"
    return RequestOptions(
        preset=name,
        budget_ratio=None if ratio is None else float(ratio),
        budget_tokens=tokens,
        pins=_pins(extra.get("kv_pin"), prompt_len),
        task=_choice(extra, "kv_task", ["auto", *TASKS], rule),
        draft_tokens=_whole_number(extra, "kv_draft_tokens", 0),
        session=session,
        shared_prefix=shared_prefix,
    )


def named_config(server: CompressionConfig, options: RequestOptions) -> CompressionConfig | None:
    """The preset a request named, or the server's setting; None when it opted out."""
    if options.preset == NONE:
        return None
    return preset(options.preset) if options.preset is not None else server


def choose_task(
    server: CompressionConfig, options: RequestOptions, classify: Callable[[], str | None]
) -> tuple[str | None, str | None]:
    """Decide which task's fields a request runs under, and who decided.

    Parameters
    ----------
    server, options
        The server's setting and what the request asked for.
    classify : callable
        Asked only where neither of the two decides; returns None where it cannot tell.

    Returns
    -------
    tuple of (str or None, str or None)
        Task and one of "request", "config", "classifier", "default"; both None where the setting
        does not depend on the task.
    """
    config = named_config(server, options)
    if config is None or not config.tasks:
        return None, None
    if options.task not in (None, "auto"):
        return options.task, "request"
    if options.task is None and config.task != "auto":
        return config.task, "config"
    task = classify()
    return (task, "classifier") if task is not None else (TASKS[0], "default")


def resolve_request(
    server: CompressionConfig, options: RequestOptions, task: str | None = None
) -> CompressionConfig | None:
    """The configuration one request runs under; None when it opted out.

    A shared prefix is compressed where it ends, whatever triggers the setting else, and what
    follows it never is. The request's pins come on top of the configured ones. Layer groups are
    always the server's: they are block tables, made once; so is the mode. `task` is what
    `choose_task` chose; it must be given where the setting depends on it.
    """
    config = named_config(server, options)
    if config is None or (server.mode == "draft" and options.draft_tokens == 0):
        return None  # nothing to draft over, and nothing else to do
    if config.tasks:
        assert task is not None, "the setting depends on the task, and none was chosen"
        config = config.by_task[task]
    update: dict[str, Any] = {}
    config = _in_mode_of(server, config)
    if options.shared_prefix is not None:
        config = setting_of_prefix(config)
    if options.draft_tokens is not None:
        update["draft"] = server.draft.model_copy(update={"tokens": options.draft_tokens})
    if options.budget_ratio is not None:
        update["budget"] = BudgetConfig(ratio=options.budget_ratio, floor=config.budget.floor)
    if options.budget_tokens is not None:
        update["budget"] = BudgetConfig(tokens=options.budget_tokens, floor=config.budget.floor)
    if options.pins:
        update["pinned"] = (*config.pinned, *(list(pin) for pin in options.pins))
    return config.model_copy(update=update) if update else config


def _in_mode_of(server: CompressionConfig, config: CompressionConfig) -> CompressionConfig:
    """A preset that a request named, in the server's mode."""
    if config is server or not server.drafts:
        return config
    fields = {"mode": server.mode, "draft": server.draft, "trigger": server.trigger}
    return config.model_copy(update=fields)


def check_fits_server(server: CompressionConfig, options: RequestOptions) -> None:
    """Refuse what this server was not started for.

    Raises
    ------
    ConfigError
        If the request's preset reads more queries while decoding than the server keeps, a task
        is given where none matters, more draft tokens than the server drafts, or a conversation
        or shared prefix that nothing can be kept of.
    """
    drafts = options.draft_tokens
    if drafts is not None and not server.drafts:
        raise ConfigError(
            "kv_draft_tokens: this server drafts no tokens; start it with "
            "--kv-compression-mode draft, or leave it out."
        )
    if drafts is not None and drafts > server.draft.tokens:
        raise ConfigError(
            f"kv_draft_tokens: at most {server.draft.tokens} (--kv-draft-tokens), got {drafts}."
        )
    config = named_config(server, options)
    if options.session is not None:
        check_session(server, config)
    if options.shared_prefix is not None:
        check_shared_prefix(server, config)
    if config is None:
        return
    if options.task is not None and not config.tasks:
        name = options.preset or "this server's setting"
        raise ConfigError(f"kv_task: {name} does not depend on the task; leave it out.")
    if server.drafts and any(each.codebook for each in (config, *config.by_task.values())):
        raise ConfigError(
            f"kv_compression: {options.preset} codes tokens, and this server drafts over views; "
            "choose a preset without a codebook."
        )
    needed, kept = decode_window(_in_mode_of(server, config)), decode_window(server)
    if needed > kept:
        raise ConfigError(
            f"kv_compression: {options.preset} reads {needed} queries while decoding and this "
            f"server keeps {kept}; start it with --kv-compression {options.preset}, or choose a "
            "preset that compresses prompts only."
        )

"""Reads what a user wrote (preset name, YAML file, overrides) into a valid setting."""

import difflib
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.registry import load_policy_class
from vllm_kvcompress.settings import CompressionConfig, merge_fields

NONE = "none"
"""The preset name that switches compression off."""

CONFIG_KEY = "kv_compression"
"""Key of our settings in ``VllmConfig.additional_config``."""


# --- presets and files --------------------------------------------------------------------


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    names = [file.name for file in files("vllm_kvcompress.configs").iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _read_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"{source}: not valid YAML: {detail}.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: the file must hold a mapping of fields to values.")
    return data


def _read_preset(name: str) -> tuple[dict[str, Any], str]:
    """Return the raw fields of a preset name or a YAML path, and how to call it in messages."""
    if name in preset_names():
        resource = files("vllm_kvcompress.configs") / f"{name}.yaml"
        return _read_yaml(resource.read_text(encoding="utf-8"), f"preset {name}"), f"preset {name}"
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise ConfigError(f"--kv-compression: there is no file {name}.")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}: cannot be read as UTF-8 text: {error}.") from None
        return _read_yaml(text, name), name
    raise ConfigError(
        f"--kv-compression: there is no preset {name!r}{did_you_mean(name, preset_names())}; "
        f"allowed are none, {', '.join(preset_names())}, or the path of a .yaml file."
    )


# --- parsing ------------------------------------------------------------------------------


def did_you_mean(word: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _model_at(model: type[BaseModel], loc: tuple[Any, ...]) -> type[BaseModel] | None:
    """The pydantic model that owns the last step of an error location, if it can be told."""
    for step in loc[:-1]:
        field = model.model_fields.get(str(step))
        annotation = field.annotation if field else None
        kinds = get_args(annotation) or (annotation,)  # of "X or None", too
        found = [each for each in kinds if isinstance(each, type) and issubclass(each, BaseModel)]
        if len(found) != 1:
            return None
        model = found[0]
    return model


def _steps(problem: Any) -> tuple[Any, ...]:
    """Fields and places in lists on the way to a problem; pydantic names kinds of values, too."""
    kinds = ("function-", "constrained-", "tuple[")
    return tuple(step for step in problem["loc"] if not str(step).startswith(kinds))


def _sentence(error: ValidationError, model: type[BaseModel], source: str, prefix: str = "") -> str:
    """First problem of a validation error, as one sentence that names file and field."""
    problems = error.errors(include_url=False)
    loc = _steps(problems[0])
    # Of a field that may be a number or a list, what is wrong in the list says more.
    alike = (each for each in problems if _steps(each)[: len(loc)] == loc)
    first = max(alike, key=lambda each: len(_steps(each)))
    loc = _steps(first)
    field = (prefix + ".".join(str(step) for step in loc)).rstrip(".")
    where = f"{source}: {field}" if field else source
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        owner = _model_at(model, loc)
        allowed = sorted(owner.model_fields) if owner else []
        hint = did_you_mean(str(loc[-1]), allowed)
        return f"{where}: unknown field{hint}; allowed are {', '.join(allowed)}{more}."
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{where}: this field is required{more}."
    got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    return f"{where}: {message[:1].lower()}{message[1:]}{got}{more}."


def _validate(fields: Mapping[str, Any], source: str) -> CompressionConfig:
    try:
        config = CompressionConfig.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(_sentence(error, CompressionConfig, source)) from None
    for task in config.tasks:
        try:
            variant = config.validate_task(task)
        except ValidationError as error:
            text = _sentence(error, CompressionConfig, source, prefix=f"tasks.{task}.")
            raise ConfigError(text) from None
        _validate_policy(variant, source, f"tasks.{task}.")
    _validate_policy(config, source, "")
    return config


def _validate_policy(config: CompressionConfig, source: str, prefix: str) -> None:
    """The policy exists, takes its parameters, and can do what the setting asks of it."""
    try:
        policy_class = load_policy_class(config.policy.name)
    except ConfigError as error:
        raise ConfigError(f"{source}: {prefix}{error}") from None
    try:
        policy_class.model_validate(config.policy.params)  # type: ignore[attr-defined]
    except ValidationError as error:
        text = _sentence(error, policy_class, source, prefix=f"{prefix}policy.")
        raise ConfigError(text) from None
    policy = config.build_policy()
    if config.refreshes_views and not policy.runs_while_decoding:
        raise ConfigError(
            f"{source}: {prefix}draft: {config.policy.name} cannot score while decoding; leave "
            "refresh_every and refresh_below out."
        )
    if not config.compresses_while_decoding:
        return
    if not policy.runs_while_decoding:
        raise ConfigError(
            f"{source}: {prefix}trigger: {config.policy.name} cannot compress while decoding; "
            "set end_of_prompt."
        )
    if policy.queries.value != "none" and config.interval < config.observation_window:
        raise ConfigError(
            f"{source}: {prefix}interval: must be at least observation_window "
            f"({config.observation_window}), whose queries {config.policy.name} reads, "
            f"got {config.interval}."
        )


def parse_config(
    setting: str | Mapping[str, Any] | None, overrides: Mapping[str, Any] | None = None
) -> CompressionConfig | None:
    """Turn what a user wrote into a valid configuration.

    Parameters
    ----------
    setting : str, mapping or None
        "none", a preset name, the path of a YAML file, or the fields themselves; a mapping may
        name a preset under the key "preset" and change some of its fields.
    overrides : mapping or None
        Fields laid over the setting (``--kv-compression-config``).

    Returns
    -------
    CompressionConfig or None
        None means no compression.

    Raises
    ------
    ConfigError
        One sentence that names file and field and says what is allowed.
    """
    if isinstance(setting, Mapping):
        fields = dict(setting)
        preset = fields.pop("preset", None)
        inner = parse_fields(preset) if preset is not None else ({}, "kv_compression")
        if inner is None:
            _refuse_overrides(fields or overrides)
            return None
        base, source = merge_fields(inner[0], fields), inner[1]
    elif setting is None or isinstance(setting, str):
        named = parse_fields(setting)
        if named is None:
            _refuse_overrides(overrides)
            return None
        base, source = named
    else:
        raise ConfigError(
            f"kv_compression: expected a preset name or a mapping of fields, got {setting!r}."
        )
    if overrides:
        base, source = merge_fields(base, overrides), f"{source} with --kv-compression-config"
    return _validate(base, source)


def parse_fields(name: Any) -> tuple[dict[str, Any], str] | None:
    """Raw fields of a preset name or path and its name for messages; None for "none"."""
    if name is None or name == NONE:
        return None
    if not isinstance(name, str):
        raise ConfigError(f"kv_compression: preset must be a name or a path, got {name!r}.")
    return _read_preset(name)


def _refuse_overrides(overrides: Mapping[str, Any] | None) -> None:
    if overrides:
        raise ConfigError(
            "--kv-compression-config: there is nothing to change, because --kv-compression is "
            f"not set; allowed are {', '.join(preset_names())}, or the path of a .yaml file."
        )


def parse_json(text: str) -> dict[str, Any]:
    """Parse ``--kv-compression-config``; a JSON object, or vLLM's dotted form turned into one."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--kv-compression-config: not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ConfigError("--kv-compression-config: expected a JSON object of fields.")
    return value

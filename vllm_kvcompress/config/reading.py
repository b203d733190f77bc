"""Reads what a user wrote (preset name, YAML file, overrides) into a valid setting."""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import ValidationError

from vllm_kvcompress.config.idle_fields import refuse_idle
from vllm_kvcompress.config.merging import merge_fields
from vllm_kvcompress.config.plain_values import build, plain_fields
from vllm_kvcompress.config.settings import CompressionConfig, PolicyConfig
from vllm_kvcompress.config.validation_messages import explain
from vllm_kvcompress.config.yaml_reader import parse_yaml, read_yaml_file
from vllm_kvcompress.errors import ConfigError, config_error, did_you_mean
from vllm_kvcompress.registry import load_policy_class

NONE = "none"
"""The preset name that switches compression off."""

CONFIG_KEY = "kv_compression"
"""Key of our settings in ``VllmConfig.additional_config``."""

_FLAG, _OVERRIDES = "--kv-compression", "--kv-compression-config"


# --- presets and files --------------------------------------------------------------------


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    return list(_preset_names())


@cache
def _preset_names() -> tuple[str, ...]:
    # Once: every request asks, and none should reach the file system.
    names = [file.name for file in files("vllm_kvcompress.configs").iterdir()]
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


@cache
def preset(name: str) -> CompressionConfig:
    """A shipped preset by one of `preset_names`. Its file is read once in a process."""
    config = parse_config(name)
    assert config is not None and name in _preset_names(), name
    return config


def _read_preset(name: str) -> tuple[dict[str, Any], str]:
    """Return the plain fields of a preset name or a YAML path, and how to call it in messages."""
    presets = preset_names()
    if name in presets:
        resource = files("vllm_kvcompress.configs") / f"{name}.yaml"
        source = f"preset {name}"
        return parse_yaml(resource.read_text(encoding="utf-8"), source), source
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return plain_fields(read_yaml_file(name, _FLAG), name), name
    rule = (
        f"there is no preset {{got}}{did_you_mean(name, presets)}; allowed are none, "
        f"{', '.join(presets)}, or the path of a .yaml file"
    )
    raise config_error(_FLAG, "", rule, name)


# --- validation ---------------------------------------------------------------------------


def _validate(fields: Mapping[str, Any], source: str) -> CompressionConfig:
    config = _build_setting(fields, source)
    for task in config.tasks:
        prefix = f"tasks.{task}."
        variant = _build_setting(config.task_fields(task), source, prefix)
        _validate_policy(variant, source, prefix)
    _validate_policy(config, source, "")
    return config


def _build_setting(fields: Mapping[str, Any], source: str, prefix: str = "") -> CompressionConfig:
    try:
        return build(CompressionConfig, fields)
    except ValidationError as error:
        raise explain(error, CompressionConfig, fields, source, prefix) from None


def _check_parameters(fields: Mapping[str, Any], source: str, prefix: str) -> None:
    """A policy exists and takes its parameters, and so do policies among these."""
    name, params = fields["name"], {k: v for k, v in fields.items() if k != "name"}
    try:
        policy_class = load_policy_class(name)
    except ConfigError as error:
        raise config_error(source, f"{prefix}name", str(error)) from None
    for key, field in policy_class.model_fields.items():
        inner = params.get(key)
        nested = isinstance(field.annotation, type) and issubclass(field.annotation, PolicyConfig)
        if nested and isinstance(inner, dict) and isinstance(inner.get("name"), str):
            _check_parameters(inner, source, f"{prefix}{key}.")
    if params and not policy_class.model_fields:
        raise config_error(source, f"{prefix}{min(params)}", f"{name} takes no parameters")
    try:
        build(policy_class, params)
    except ValidationError as error:
        raise explain(error, policy_class, params, source, prefix) from None
    except Exception as error:  # of somebody else's validator
        rule = f"{name} fails on these parameters: {type(error).__name__}: {error}"
        raise config_error(source, prefix.rstrip("."), rule) from error


def _validate_policy(config: CompressionConfig, source: str, prefix: str) -> None:
    """The policy exists, takes its parameters, and can do what the setting asks of it."""
    name = config.policy.name
    _check_parameters({**config.policy.params, "name": name}, source, f"{prefix}policy.")
    policy = config.build_policy()
    if config.refreshes_views and not policy.runs_while_decoding:
        rule = f"{name} cannot score while decoding; leave refresh_every and refresh_below out"
        raise config_error(source, f"{prefix}draft", rule)
    if not config.compresses_while_decoding and not config.compresses_in_prompts:
        return
    if not policy.runs_while_decoding or (
        config.compresses_in_prompts and policy.queries.value == "prompt"
    ):
        what = "while decoding" if config.compresses_while_decoding else "inside the prompt"
        rule = f"{name} cannot compress {what}; set end_of_prompt"
        raise config_error(source, f"{prefix}trigger", rule)
    if not config.compresses_while_decoding:
        return
    window = config.observation_window
    if policy.queries.value != "none" and config.interval < window:
        rule = f"must be at least observation_window ({window}), whose queries {name} reads"
        raise config_error(source, f"{prefix}interval", rule, config.interval)


# --- parsing ------------------------------------------------------------------------------


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
    changes = {} if overrides is None else plain_fields(overrides, _OVERRIDES)
    if isinstance(setting, Mapping):
        own = plain_fields(setting, CONFIG_KEY)
        preset = own.pop("preset", None)
        base: Mapping[str, Any]
        if preset is None:
            base, source = {}, CONFIG_KEY
            # Perhaps a complete setting (`to_dict`), whose every field is given.
            written = {} if "tasks" in own else {k: own[k] for k in own.keys() & {"task"}}
        else:
            named = _parse_fields(preset)
            if named is None:
                _refuse_overrides(own or changes)
                return None
            (base, source), written = named, own
        base = merge_fields(base, own)
    elif setting is None or isinstance(setting, str):
        named = _parse_fields(setting)
        if named is None:
            _refuse_overrides(changes)
            return None
        base, source = named
        written = {} if setting in preset_names() else base
    else:
        rule = "expected a preset name or a mapping of fields"
        raise config_error(CONFIG_KEY, "", rule, setting)
    if changes:
        base, source = merge_fields(base, changes), f"{source} with {_OVERRIDES}"
        written = changes
    config = _validate(base, source)
    refuse_idle(written, config, source)
    return config


def _parse_fields(name: Any) -> tuple[dict[str, Any], str] | None:
    """Plain fields of a preset name or path and its name for messages; None for "none"."""
    if name is None or name == NONE:
        return None
    if not isinstance(name, str):
        raise config_error(CONFIG_KEY, "preset", "must be a name or a path", name)
    return _read_preset(name)


def _refuse_overrides(overrides: Mapping[str, Any]) -> None:
    if overrides:
        rule = (
            f"there is nothing to change, because {_FLAG} is not set; allowed are "
            f"{', '.join(preset_names())}, or the path of a .yaml file"
        )
        raise config_error(_OVERRIDES, "", rule)


def parse_json(text: str) -> dict[str, Any]:
    """Parse ``--kv-compression-config``; a JSON object, or vLLM's dotted form turned into one.

    Raises
    ------
    ConfigError
        One sentence about what is no JSON, or no setting could be made of.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once_each)
    except json.JSONDecodeError as error:
        raise config_error(_OVERRIDES, "", f"not valid JSON: {error}") from None
    except RecursionError:
        raise config_error(_OVERRIDES, "", "not a setting: nested too deep") from None
    except ConfigError:
        raise
    except ValueError:  # of int()
        raise config_error(_OVERRIDES, "", "not valid JSON: a number is too long") from None
    if not isinstance(value, dict):
        raise config_error(_OVERRIDES, "", "expected a JSON object of fields", value)
    return plain_fields(value, _OVERRIDES)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise config_error(_OVERRIDES, twice, "this field is given twice; keep one")
    return fields


# --- in a running server ------------------------------------------------------------------


def server_setting(additional_config: Any) -> CompressionConfig | None:
    """The setting in ``VllmConfig.additional_config`` of a server; None without compression."""
    if not isinstance(additional_config, dict) or CONFIG_KEY not in additional_config:
        return None
    return _setting_of(json.dumps(additional_config[CONFIG_KEY]))


@cache
def _setting_of(text: str) -> CompressionConfig | None:
    return parse_config(json.loads(text))

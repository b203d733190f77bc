"""Settings of the server: pydantic models, preset and YAML reading, overrides.

Everything that comes out of here is frozen and valid.
"""

import difflib
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.registry import load_policy_class

NONE = "none"
"""The preset name that switches compression off."""

CONFIG_KEY = "kv_compression"
"""Key of our settings in ``VllmConfig.additional_config``."""

Range = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BudgetConfig(_Model):
    """How many tokens of a prompt survive, averaged over the layers.

    Attributes
    ----------
    ratio : float or None
        Share of the prompt to keep, in (0, 1]. Exactly one of `ratio` and `tokens` is set.
    tokens : int or None
        Tokens to keep, whatever the prompt's length.
    floor : int, default 64
        Never aim at fewer tokens than this.
    """

    ratio: float | None = Field(default=None, gt=0, le=1)
    tokens: int | None = Field(default=None, ge=1)
    floor: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _one_of(self) -> "BudgetConfig":
        if (self.ratio is None) == (self.tokens is None):
            raise ValueError("set exactly one of ratio and tokens")
        return self


class LayerGroupsConfig(_Model):
    """Runs of consecutive layers that share one block table and one budget.

    Attributes
    ----------
    count : int or None
        Number of groups, of sizes that differ by at most one. Exactly one of `count` and `size`.
    size : int or None
        Layers per group; the last group may be smaller.
    """

    count: int | None = Field(default=None, ge=1)
    size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_of(self) -> "LayerGroupsConfig":
        if (self.count is None) == (self.size is None):
            raise ValueError("set exactly one of count and size")
        return self


class LayerBudgetConfig(_Model):
    """How the budget is spread over the layer groups.

    Attributes
    ----------
    shape : {"uniform", "pyramid"}
        "pyramid" is PyramidKV's (arXiv 2406.02069): most in the first group, falling linearly.
    beta : float, default 20.0
        Steepness of the pyramid: the last group gets 1/beta of the average. Greater than 1.
    """

    shape: Literal["uniform", "pyramid"] = "uniform"
    beta: float = Field(default=20.0, gt=1)


class PolicyConfig(BaseModel):
    """Name of a policy; every other key is one of the policy's own parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def params(self) -> dict[str, Any]:
        """The policy's own parameters."""
        return dict(self.model_extra or {})


class CompressionConfig(_Model):
    """One complete setting, as a preset file holds it.

    Attributes
    ----------
    version : 1
        Format of this file.
    policy : PolicyConfig
        Which tokens survive.
    budget, layer_groups, layer_budget
        How many, and how they are spread over the layers.
    num_sink_tokens : int, default 4
        First tokens of the prompt, never evicted.
    observation_window : int, default 16
        Last tokens of the prompt, never evicted; policies that need queries use theirs.
    trigger : "end_of_prompt"
        When a request is compressed.
    min_prompt_len : int, default 512
        Shorter prompts are left alone.
    pinned : list of [start, end)
        Prompt positions that are never evicted in any request (a system prompt, say).
    """

    version: Literal[1] = 1
    policy: PolicyConfig
    budget: BudgetConfig
    layer_groups: LayerGroupsConfig = LayerGroupsConfig(count=1)
    layer_budget: LayerBudgetConfig = LayerBudgetConfig()
    num_sink_tokens: int = Field(default=4, ge=0)
    observation_window: int = Field(default=16, ge=1)
    trigger: Literal["end_of_prompt"] = "end_of_prompt"
    min_prompt_len: int = Field(default=512, ge=0)
    pinned: tuple[Range, ...] = ()

    @model_validator(mode="after")
    def _check_ranges(self) -> "CompressionConfig":
        for start, end in self.pinned:
            if start >= end:
                raise ValueError(f"pinned: [{start}, {end}] is empty; a range is [start, end)")
        return self

    def build_policy(self) -> Any:
        """Instantiate the policy with its own parameters (validated by `parse_config`)."""
        return load_policy_class(self.policy.name)(**self.policy.params)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form that `parse_config` reads back to an equal object."""
        return self.model_dump(mode="json", exclude_none=True)


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
        return _read_yaml(path.read_text(encoding="utf-8"), name), name
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
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        model = annotation
    return model


def _sentence(error: ValidationError, model: type[BaseModel], source: str, prefix: str = "") -> str:
    """First problem of a validation error, as one sentence that names file and field."""
    problems = error.errors(include_url=False)
    first = problems[0]
    loc = tuple(step for step in first["loc"] if not str(step).startswith("function-"))
    field = prefix + ".".join(str(step) for step in loc)
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


_EXCLUSIVE = {"budget": {"ratio", "tokens"}, "layer_groups": {"count", "size"}}


def _merge(base: dict[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Overlay `override` on `base`. Setting one of two exclusive fields drops the other."""
    merged = dict(base)
    for key, value in override.items():
        known = merged.get(key)
        if not (isinstance(value, Mapping) and isinstance(known, Mapping)):
            merged[key] = value
            continue
        known = dict(known)
        if key == "policy" and value.get("name", known.get("name")) != known.get("name"):
            known = {}  # another policy: the old one's parameters mean nothing to it
        if _EXCLUSIVE.get(key, set()) & value.keys():
            known = {k: v for k, v in known.items() if k not in _EXCLUSIVE[key]}
        merged[key] = _merge(known, value)
    return merged


def _validate(fields: Mapping[str, Any], source: str) -> CompressionConfig:
    try:
        config = CompressionConfig.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(_sentence(error, CompressionConfig, source)) from None
    try:
        policy_class = load_policy_class(config.policy.name)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    try:
        policy_class.model_validate(config.policy.params)  # type: ignore[attr-defined]
    except ValidationError as error:
        raise ConfigError(_sentence(error, policy_class, source, prefix="policy.")) from None
    return config


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
        base, source = _merge(inner[0], fields), inner[1]
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
        base, source = _merge(base, overrides), f"{source} with --kv-compression-config"
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

"""Turns what pydantic says about wrong fields into one sentence."""

import re
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from vllm_kvcompress.errors import ConfigError, config_error, did_you_mean

_PLAIN_WORDS = {
    "bool_type": "input should be true or false",
    "model_type": "input should be a mapping of fields to values",
    "dict_type": "input should be a mapping of fields to values",
    "list_type": "input should be a list",
    "tuple_type": "input should be a list",
    "missing": "this field is required",
}
_NAMED = re.compile(r"([a-z_]\w*)((?:\.\w+)*): ")  # how a validator of several fields names one


def explain(
    error: ValidationError,
    model: type[BaseModel],
    fields: Mapping[str, Any],
    source: str,
    prefix: str = "",
) -> ConfigError:
    """Make the error for the first problem that pydantic found.

    Parameters
    ----------
    error : ValidationError
        What building `model` from `fields` raised.
    model : type of BaseModel
        What was to be built.
    fields : mapping
        Plain fields, as the user wrote them.
    source : str
        The user's file, flag or key.
    prefix : str
        What the names of the fields begin with, such as "policy."; "" at the top.

    Returns
    -------
    ConfigError
        One sentence that names the field and what is allowed, and says how many more are wrong.
    """
    problems = [(_steps(each, fields), each) for each in error.errors(include_url=False)]
    steps = problems[0][0]
    # Of a field that may be a number or a list, what is wrong in the list says more.
    alike = [each for each in problems if each[0][: len(steps)] == steps]
    steps, first = max(alike, key=lambda each: len(each[0]))
    others = len(problems) - len(alike)
    more = f" (and {others} more)" if others else ""
    kind = first["type"]
    if kind == "extra_forbidden":
        rule = _unknown(model, steps)
    elif kind == "value_error":
        rule = first["msg"].removeprefix("Value error, ")
        named = _NAMED.match(rule)
        owner = _model_at(model, steps)
        if named and owner and named[1] in owner.model_fields:
            steps = (*steps, named[1] + named[2])
            rule = rule[named.end() :]
    else:
        rule = _PLAIN_WORDS.get(kind, first["msg"])
    field = (prefix + ".".join(map(str, steps))).rstrip(".")
    rule = rule[:1].lower() + rule[1:]
    if kind in ("extra_forbidden", "value_error", "missing"):
        return config_error(source, field, rule + more)
    return config_error(source, field, f"{rule}, got {{got}}{more}", first["input"])


def _unknown(model: type[BaseModel], steps: tuple[Any, ...]) -> str:
    owner = _model_at(model, steps[:-1])
    allowed = sorted(owner.model_fields) if owner else []
    if not allowed:
        return "unknown field; none is allowed here"
    hint = did_you_mean(str(steps[-1]), allowed)
    return f"unknown field{hint}; allowed are {', '.join(allowed)}"


def _steps(problem: Any, fields: Mapping[str, Any]) -> tuple[Any, ...]:
    """Fields and places in lists on the way to a problem; pydantic names kinds of values, too."""
    steps: list[Any] = []
    at: Any = fields
    for step in problem["loc"]:
        places: Any = at if isinstance(at, dict) else range(len(at) if isinstance(at, list) else 0)
        if step in places:
            at = at[step]
        elif problem["type"] != "missing" or step != problem["loc"][-1]:
            continue
        steps.append(step)
    return tuple(steps)


def _model_at(model: type[BaseModel], steps: tuple[Any, ...]) -> type[BaseModel] | None:
    """The pydantic model of the value at the end of some steps, if it can be told."""
    for step in steps:
        field = model.model_fields.get(str(step))
        annotation = field.annotation if field else None
        kinds = get_args(annotation) or (annotation,)  # of "X or None", too
        found = [each for each in kinds if isinstance(each, type) and issubclass(each, BaseModel)]
        if len(found) != 1:
            return None
        model = found[0]
    return model

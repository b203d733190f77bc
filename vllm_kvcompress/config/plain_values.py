"""What a setting may be made of: fields, lists, text, numbers, true and false, within limits.

Whatever a setting comes from (a file, a flag, Python), it goes through here first. Behind it, no
value can be endless, and pydantic sees the same as if the setting were JSON.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from vllm_kvcompress.errors import config_error

MAX_DEPTH = 16
"""Fields and lists inside one another; a setting needs 5."""

MAX_VALUES = 20_000
"""Values of one setting, each time it is referred to by a YAML alias: a bound on work and memory.

The largest honest setting is a list of pinned ranges, 3 values each.
"""

Model = TypeVar("Model", bound=BaseModel)


def plain_fields(fields: Any, source: str) -> dict[str, Any]:
    """Copy a mapping of fields into dicts, lists, str, int, float, bool and None.

    Parameters
    ----------
    fields : anything
        Usually a mapping.
    source : str
        The user's file, flag or key, for messages.

    Raises
    ------
    ConfigError
        One sentence about the first value that is something else, or too large.
    """
    if not isinstance(fields, Mapping):
        raise config_error(source, "", "expected a mapping of fields to values", fields)
    return _Copier(source).copy(fields, ())


def build(model: type[Model], fields: Mapping[str, Any]) -> Model:
    """Validate plain fields without coercion: text is no number, and true is no 1.

    JSON is the strict mode that still takes a list for a tuple, and 1 for a float.

    Raises
    ------
    ValidationError
        Pydantic's, about every field that is wrong.
    """
    return model.model_validate_json(json.dumps(fields), strict=True)


class _Copier:
    def __init__(self, source: str) -> None:
        self._source = source
        self._left = MAX_VALUES

    def copy(self, value: Any, path: tuple[str, ...]) -> Any:
        field = ".".join(path)
        self._left -= 1
        if self._left < 0:
            rule = f"more than {MAX_VALUES} values, counted at every use of a YAML alias"
            raise config_error(self._source, path[0], f"{rule}; write fewer")
        if len(path) > MAX_DEPTH:
            rule = f"fields and lists can be nested {MAX_DEPTH} deep at most"
            raise config_error(self._source, ".".join(path[:3]), rule)
        if isinstance(value, Mapping):
            return {self._key(k, field): self.copy(v, (*path, str(k))) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.copy(each, (*path, str(place))) for place, each in enumerate(value)]
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._text(value, field)
        if isinstance(value, int):
            if abs(value) >= 2**63:
                raise config_error(self._source, field, "must be a number below 2**63", value)
            return int(value)
        if isinstance(value, float):
            if not math.isfinite(value):
                raise config_error(self._source, field, "must be a finite number", value)
            return float(value)
        rule = "expected text, a number, true, false, null, a list or fields"
        raise config_error(self._source, field, rule, value)

    def _key(self, key: Any, field: str) -> str:
        if not isinstance(key, str):
            raise config_error(self._source, field, "names of fields must be text", key)
        return self._text(key, field)

    def _text(self, text: str, field: str) -> str:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise config_error(self._source, field, "not valid Unicode", text) from None
        return text

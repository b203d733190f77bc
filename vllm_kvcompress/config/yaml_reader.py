"""Reads a YAML file of fields: plain values only, every field once, in bounded time."""

import re
import stat
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from vllm_kvcompress.errors import Bare, ConfigError, config_error

MAX_BYTES = 256 * 1024
"""Of a file; more is no setting, and PyYAML takes seconds for it."""

MAX_DEPTH = 16
"""Of fields and lists inside one another: PyYAML recurses, and a setting needs 5."""

MAX_NODES = 50_000
"""Of a file, with every alias counted as the nodes that it stands for.

Aliases and merge keys are useful, so they are not forbidden; but nine levels of nine aliases each
stand for half a billion nodes ("billion laughs"), which a merge key would write out.
"""

_STR, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


def read_yaml_file(name: str, flag: str) -> dict[str, Any]:
    """Read the fields of a file.

    Parameters
    ----------
    name : str
        Path, as the user wrote it.
    flag : str
        Where they wrote it, for messages about a path that names no file.

    Raises
    ------
    ConfigError
        One sentence: there is no such file, it cannot be read, or `parse_yaml` refuses it.
    """
    try:
        path = Path(name).expanduser()
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise config_error(flag, "", "{got} is a directory; name a .yaml file", Bare(name))
        if not stat.S_ISREG(kind):  # reading a pipe would wait for ever
            rule = "{got} is no regular file; name a .yaml file"
            raise config_error(flag, "", rule, Bare(name))
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise config_error(flag, "", "there is no file {got}", Bare(name)) from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise config_error(flag, "", f"{{got}} cannot be read: {reason}", Bare(name)) from None
    except ConfigError:
        raise
    except ValueError:  # a NUL or half an emoji in it
        raise config_error(flag, "", "{got} cannot be the name of a file", name) from None
    except RuntimeError:  # of expanduser
        rule = "there is no home directory for {got}; write the path out"
        raise config_error(flag, "", rule, Bare(name)) from None
    if len(data) > MAX_BYTES:
        raise config_error(name, "", f"the file is larger than {MAX_BYTES // 1024} KiB")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} is {data[error.start]:#04x}"
        rule = f"the file cannot be decoded as UTF-8 text: {byte}"
        raise config_error(name, "", rule) from None
    return parse_yaml(text, name)


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """Parse YAML that holds a mapping.

    Raises
    ------
    ConfigError
        One sentence that names the line, and the field where it can be told.
    """
    try:
        data = _parse(text)
    except _FieldError as error:
        raise config_error(source, error.field, error.rule, *error.got) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        detail = ", ".join(filter(None, (error.context, error.problem)))
        raise config_error(source, "", f"not valid YAML: {place}{detail}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        rule = f"not valid YAML: line {line}: the character {error.character:#x} is not allowed"
        raise config_error(source, "", rule) from None
    except (ValueError, OverflowError):  # PyYAML hands the digits of an escape to chr()
        rule = "not valid YAML: an escape stands for no character"
        raise config_error(source, "", rule) from None
    rule = "the file must hold a mapping of fields to values"
    if data is None:
        raise config_error(source, "", f"{rule}, and it is empty")
    if not isinstance(data, dict):
        raise config_error(source, "", rule, data)
    return data


def _parse(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _FieldError(Exception):
    """What is wrong with one field, and what the user gave."""

    def __init__(self, field: str, rule: str, *got: Any) -> None:
        self.field, self.rule, self.got = field, rule, got


class _Loader(yaml.SafeLoader):
    """Safe loader that checks nodes as they are composed, before values are made of them."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._path: list[str] = []  # from the root to the node that is being composed
        self._num_nodes = 0
        self._sizes: dict[yaml.Node, int] = {}  # nodes in it, of every finished node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Check what comes next and compose it.

        `index` is a place in a list, the node of a field's name, or None for a name or the root.
        """
        event, before = self.peek_event(), self._num_nodes
        line = event.start_mark.line + 1
        if index is not None:
            self._path.append(index.value if isinstance(index, yaml.Node) else str(index))
        if (tag := getattr(event, "tag", None)) is not None:
            tag = tag.replace("tag:yaml.org,2002:", "!!")
            raise self._refusal("the tag {got} is not allowed; write a plain value", Bare(tag))
        if index is None and parent is not None and not isinstance(event, yaml.ScalarEvent):
            rule = f"names of fields must be text, not a list, fields or an alias as in line {line}"
            raise self._refusal(rule)
        if len(self._path) > MAX_DEPTH:
            raise self._refusal(f"fields and lists can be nested {MAX_DEPTH} deep at most")
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            if node not in self._sizes:
                raise self._refusal("this alias contains itself", Bare(f"*{event.anchor}"))
            self._num_nodes += self._sizes[node]
        elif node is not None:
            self._num_nodes += 1
            self._sizes[node] = self._num_nodes - before
        if self._num_nodes > MAX_NODES:
            rule = f"more than {MAX_NODES} values, counted at every use of an alias; write fewer"
            raise self._refusal(rule)
        if isinstance(node, yaml.MappingNode) and not isinstance(event, yaml.AliasEvent):
            self._check_names(node)
        if index is not None:
            self._path.pop()
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As the base class, but int() and float() fail with a line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError):  # the second where 1:59:...:59.5 has too many parts
            rule = "this number cannot be read"
            raise ConstructorError(None, None, rule, node.start_mark) from None

    def _check_names(self, mapping: yaml.MappingNode) -> None:
        """Every name is text and comes once; names that a merge key brings are none of these."""
        lines: dict[str, int] = {}
        for name, _ in mapping.value:
            line = name.start_mark.line + 1
            if name.tag not in (_STR, _MERGE):
                rule = f"names of fields must be text, got {{got}} in line {line}"
                raise self._refusal(rule, Bare(name.value))
            if name.value in lines:
                first = lines[name.value]
                rule = f"this field is given twice, in lines {first} and {line}; keep one"
                raise _FieldError(".".join([*self._path, name.value]), rule)
            lines[name.value] = line

    def _refusal(self, rule: str, *got: Any) -> _FieldError:
        # Three names tell where it is, however deep.
        return _FieldError(".".join(self._path[:3]), rule, *got)


# Dates are text here: no field takes one, and Python fails on those that do not exist. 1e-4 is a
# number as in YAML 1.2 and JSON; YAML 1.1 wants 1.0e-4.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)

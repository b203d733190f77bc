"""Files of somebody's own: text in UTF-8, or one JSON value per line; refused in one sentence."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_kvcompress.errors import ConfigError, config_error


def check_text(value: Any, where: str, field: str, may_be_empty: bool = False) -> None:
    """Raise a ConfigError unless the value is a text that can be encoded."""
    if not isinstance(value, str):
        raise config_error(where, field, "allowed is a text", value)
    if not may_be_empty and not value.strip():
        raise config_error(where, field, "the text is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise config_error(where, field, "the text holds half a character (surrogate)") from None


def read_text(path: Path) -> str:
    """Content of a file without a byte order mark; a ConfigError if it is no UTF-8 text."""
    return decode_utf8(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """Content of a file; a ConfigError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def decode_utf8(content: bytes, where: str) -> str:
    """Text of bytes, without a byte order mark; a ConfigError if they are not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise config_error(
            where, "", f"this is not UTF-8 text (byte {byte:#04x} at {error.start})"
        ) from None


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers from 1 and values of a .jsonl file; empty lines are skipped.

    Lines end at line feeds only: JSON texts may hold other line ends, such as U+2028, as they are.

    Raises
    ------
    ConfigError
        If the file cannot be read or a line is not JSON in UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, content in enumerate(file, start=1):
                line = decode_utf8(content, f"{path}:{number}")
                if line.strip():
                    yield number, _json(line, f"{path}:{number}")
    except OSError as error:
        raise _unreadable(path, error) from None


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise config_error(where, "", f"not valid JSON ({error})") from None


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return config_error(str(path), "", f"cannot be read ({error.strerror or error})")

"""Errors for people: what was wrong, where, what is allowed."""

import difflib
import reprlib
from typing import Any

MAX_LENGTH = 400
"""Most characters of a sentence about a setting, however much the user gave."""

_ROOMS = (300, 120, 60, 30, 16)  # for what the user gave, until the sentence fits
_NAME_ROOM = 60  # at least, for the source and for the field: our own sources are shorter


class ConfigError(ValueError):
    """A setting the user gave is wrong. The message is one sentence ready to print."""


class UnsupportedModelError(ValueError):
    """The model or the server options rule compression out.

    The message is one sentence that ends with the option to change.
    """


class PolicyError(RuntimeError):
    """A policy returned what is no scores. The message says which policy, and what it was."""


def config_error(source: str, field: str, rule: str, *got: Any) -> ConfigError:
    """Make the error for one wrong setting: "SOURCE: FIELD: RULE, got GOT." on one line.

    Parameters
    ----------
    source : str
        The user's file, flag or key.
    field : str
        Dotted name of the field as the user wrote it; "" if the problem is no single field.
    rule : str
        What is allowed. "{got}" in it is where to show `got`; else it comes last.
    got : anything
        What the user gave; at most one.

    Returns
    -------
    ConfigError
        Of at most `MAX_LENGTH` characters. Where that is too few, what the user gave is shortened,
        and the rule only if nothing else is left to shorten.
    """
    rule = " ".join(rule.split()).rstrip(".")
    if got and "{got}" not in rule:
        rule += ", got {got}"
    shown = _echo(got[0]) if got else ""
    names = [_printable(name) for name in (source, field) if name]
    for room in _ROOMS:
        place = "".join(f"{_shorten(name, max(room, _NAME_ROOM))}: " for name in names)
        sentence = rule.replace("{got}", _shorten(shown, room))
        left = MAX_LENGTH - len(place) - len(".")
        if len(sentence) <= left:
            break
    return ConfigError(f"{place}{_shorten(sentence, left)}.")


def did_you_mean(word: str, allowed: list[str]) -> str:
    """A hint at the allowed word that is closest, with a space before it; "" if none is close."""
    close = difflib.get_close_matches(word[:64], allowed, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def one_line(text: str, room: int = 300) -> str:
    """Somebody else's text as a log may show it: printable, on one line, of `room` characters."""
    return _shorten(_printable(" ".join(text[: 8 * room].split())), room)


class Bare(str):
    """Text that is shown without quotes where it was refused: a path, a piece of a file."""


class _Excerpts(reprlib.Repr):
    """`repr` that neither grows with its argument nor fails."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxother = 3, 4, 120
        self.maxstring = 320  # cut to what fits later

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to print more than 4300 digits, and nobody wants to read 50.
        digits = int(value.bit_length() * 0.30103) + 1
        return repr(value) if digits <= 40 else f"a number of {digits} digits"


_EXCERPTS = _Excerpts()


def _echo(value: Any) -> str:
    try:
        text = str(value) if isinstance(value, Bare) else _EXCERPTS.repr(value)
    except Exception:  # a class of the caller's, whose repr fails
        text = f"an object of type {type(value).__name__}"
    return _printable(" ".join(text.split()))


def _printable(text: str) -> str:
    """Text on one line and without characters that cannot be printed, such as half an emoji."""
    return text if text.isprintable() else repr(text)[1:-1]


def _shorten(text: str, room: int) -> str:
    """The beginning and the end of a text that is longer than `room`."""
    if len(text) <= room:
        return text
    tail = room // 2 - 2
    return f"{text[: room - 3 - tail]}...{text[-tail:]}"

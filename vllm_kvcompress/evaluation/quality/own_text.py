"""Samples out of the user's own texts: a piece to read, and the piece that follows it.

No question is asked: the measure is how well the compressed cache predicts what follows.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_kvcompress.errors import ConfigError, config_error
from vllm_kvcompress.evaluation.quality.sample import Sample
from vllm_kvcompress.evaluation.text_files import (
    check_text,
    decode_utf8,
    json_lines,
    read_bytes,
)

TASK, METRIC = "text", "continuation"

Decode = Callable[[list[int]], str]

_MOST_BYTES = 4  # of one character in UTF-8
_BROKEN = "\ufffd"  # what decoders make of half a character


class _Text(NamedTuple):
    """One text: a file, or a line of a .jsonl file."""

    name: str
    ids: list[int]


class _Piece(NamedTuple):
    """Where a sample lies: text number and its first token."""

    text: int
    start: int


def text_samples(
    paths: Sequence[Path],
    encode: Callable[[str], list[int]],
    decode: Decode,
    length: int,
    continuation: int,
    count: int,
    seed: int,
) -> list[Sample]:
    """Cut text files into samples, evenly spread and without overlap.

    A sample lies within one text. Its names, order and texts depend on the arguments only.

    Parameters
    ----------
    paths : sequence of Path
        A file is one text in UTF-8; a ``.jsonl`` file has one per line, in an object's field
        ``text`` or ``prompt``.
    encode, decode : callable
        Text to token ids and back, without special tokens.
    length, continuation : int
        Tokens to read and tokens that follow, each at least 1. Where a cut would part the bytes
        of one character it moves by up to three tokens.
    count : int
        How many samples, at least 1.
    seed : int
        Chooses among the even spreads; where every piece is needed there is only one.

    Raises
    ------
    ConfigError
        If a file cannot be read, is empty or no text, or if all are too short.
    """
    texts = [_Text(name, encode(text)) for name, text in _read(paths)]
    pieces = _spread([len(text.ids) for text in texts], length + continuation, count, seed)
    if len(pieces) < count:
        raise _too_short(paths, texts, (len(pieces), count), (length, continuation))
    return [_sample(texts[text], start, decode, length, continuation) for text, start in pieces]


def _too_short(
    paths: Sequence[Path], texts: Sequence[_Text], samples: tuple[int, int], size: tuple[int, int]
) -> ConfigError:
    """`samples` are those that fit and those asked for, `size` tokens to read and to follow."""
    total, needed = sum(len(text.ids) for text in texts), samples[1] * sum(size)
    return config_error(
        ", ".join(map(str, paths)),
        "",
        f"too short: {total} tokens hold {samples[0]} of {samples[1]} samples; needed are {needed} "
        f"tokens, in texts of at least {size[0]} + {size[1]} each",
    )


def _sample(text: _Text, start: int, decode: Decode, length: int, continuation: int) -> Sample:
    middle = start + length
    read, follows = _cut(text.ids, start, middle, middle + continuation, decode)
    return Sample(
        name=f"{text.name}@{start}",
        task=TASK,
        context=read,
        question="",
        answers=(),
        metric=METRIC,
        max_tokens=continuation,
        continuation=follows,
        length=length,
    )


def _spread(lengths: Sequence[int], size: int, count: int, seed: int) -> list[_Piece]:
    """Places of `count` pieces of `size` tokens in texts of these lengths; all if there are fewer.

    Every text is divided into as many places as fit, and what is left over goes between them; of
    all places an even selection is taken.
    """
    places = []
    for text, length in enumerate(lengths):
        fit = length // size
        for index in range(fit):
            # One place alone lies in the middle.
            start = index * (length - size) // (fit - 1) if fit > 1 else (length - size) // 2
            places.append(_Piece(text, start))
    if len(places) <= count:
        return places
    shift = int(random.Random(seed).random() * len(places))
    return [places[(index * len(places) + shift) // count] for index in range(count)]


def _cut(ids: list[int], start: int, middle: int, end: int, decode: Decode) -> tuple[str, str]:
    """Texts of ids[start:middle] and ids[middle:end] that, joined, are a piece of the whole.

    They are cut out of one decoded text because many decoders drop a space at the beginning.
    """
    for _ in range(_MOST_BYTES - 1):
        if start < middle - 1 and decode(ids[start:middle]).startswith(_BROKEN):
            start += 1
        if end > middle + 1 and decode(ids[middle:end]).endswith(_BROKEN):
            end -= 1
    whole = decode(ids[start:end])
    for back in range(min(_MOST_BYTES, middle - start)):
        read = decode(ids[start : middle - back])
        if whole.startswith(read) and read != whole:
            return read, whole[len(read) :]
    # A decoder that tidies up across tokens: its own texts of both pieces are the best there is.
    return decode(ids[start:middle]), decode(ids[middle:end])


def _read(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Names and texts; names are file names where these differ."""
    if not paths:
        raise ConfigError("No text file was given.")
    if len({path.resolve() for path in paths}) < len(paths):
        twice = [path for path in paths if paths.count(path) > 1] or list(paths)
        raise config_error(str(twice[0]), "", "this file is given twice")
    short = len({path.name for path in paths}) == len(paths)
    for path in paths:
        name = path.name if short else str(path)
        if path.suffix.lower() == ".jsonl":
            found = False
            for number, row in json_lines(path):
                found = True
                yield f"{name}:{number}", _text_of(row, f"{path}:{number}")
            if not found:
                raise config_error(str(path), "", "the file is empty")
        else:
            yield name, _whole_file(path)


def _text_of(row: Any, where: str) -> str:
    field = "text" if isinstance(row, dict) and "text" in row else "prompt"
    if not isinstance(row, dict) or field not in row:
        raise config_error(where, "", "allowed is an object with a field text or prompt", row)
    check_text(row[field], where, field)
    return row[field]


def _whole_file(path: Path) -> str:
    text = decode_utf8(read_bytes(path), str(path))
    if "\0" in text:
        raise config_error(str(path), "", "this is no text file: it holds zero bytes")
    if not text.strip():
        raise config_error(str(path), "", "the file is empty")
    return text

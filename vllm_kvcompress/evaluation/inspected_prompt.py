"""A prompt as the model reads it: its tokens, the text of each, and where a passage of it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.prompt_files import first_line


class Piece(NamedTuple):
    """Text of the tokens [start, end): of one, or of several that share a character."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class InspectedPrompt:
    """A prompt as the model reads it.

    Attributes
    ----------
    token_ids : list[int]
        n of them.
    pieces : list[Piece]
        Every token in order, special ones by their name.
    in_template : bool
        Whether the text was put into the model's chat template.
    needle : list[int] or None
        Tokens that hold any of the needle, all its occurrences; None if none was asked for.
    """

    token_ids: list[int]
    pieces: list[Piece]
    in_template: bool
    needle: list[int] | None


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of a model's folder.

    Raises
    ------
    ConfigError
        If there is none, or one that cannot say which characters a token stands for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model))
    except Exception as error:  # whatever a file of somebody else's makes of it
        raise ConfigError(f"--model: {model} holds no tokenizer ({first_line(error)}).") from None
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"--model: the tokenizer in {model} cannot say which characters a token stands for; "
            "choose a model with a tokenizer.json."
        )
    return tokenizer


def read_prompt(
    tokenizer: Any, text: str, chat: bool | None, needle: str | None
) -> InspectedPrompt:
    """Make tokens of a text as the server does.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The model's, a fast one.
    text : str
        What the user wrote.
    chat : bool or None
        Put it into the chat template as a user's message; None where there is one.
    needle : str or None
        The passage to look for.

    Raises
    ------
    ConfigError
        If the text is empty or no text, the template refuses it or is missing, or the needle is
        not there.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError("--prompt, --text: the text is not valid UTF-8.") from None
    in_template = chat if chat is not None else bool(tokenizer.chat_template)
    if in_template:
        text = _in_template(tokenizer, text)
    encoded = tokenizer(text, add_special_tokens=not in_template, return_offsets_mapping=True)
    token_ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if not text:
        raise ConfigError("--prompt, --text: the prompt is empty.")
    if not token_ids:  # transformers makes empty tokenizers where files are missing
        raise ConfigError(
            "--model: its tokenizer makes no tokens of the prompt; look whether tokenizer.json is "
            "there."
        )
    names = tokenizer.convert_ids_to_tokens(token_ids)
    found = None if needle is None else _find(text, needle, offsets)
    return InspectedPrompt(token_ids, _pieces(text, offsets, names), in_template, found)


def _in_template(tokenizer: Any, text: str) -> str:
    if not tokenizer.chat_template:
        raise ConfigError("--chat: the model has no chat template; leave it out.")
    message = [{"role": "user", "content": text}]
    try:
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a program of the model's authors
        raise ConfigError(
            f"--chat: the model's chat template fails ({first_line(error)}); set --no-chat."
        ) from None


def _pieces(text: str, offsets: Sequence[tuple[int, int]], names: Sequence[str]) -> list[Piece]:
    """Pieces in order; together they are the text, with the names of tokens that are not in it."""
    found: list[Piece] = []
    reached = 0
    for index, (start, end) in enumerate(offsets):
        if start == end:
            found.append(Piece(names[index], index, index + 1))
        elif end <= reached and found:  # one more byte of the same character
            found[-1] = found[-1]._replace(end=index + 1)
        else:
            found.append(Piece(text[reached:end], index, index + 1))
            reached = end
    return found


def _find(text: str, needle: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    spans, place = [], text.find(needle) if needle else -1
    while place >= 0:
        spans.append((place, place + len(needle)))
        place = text.find(needle, place + len(needle))
    if not spans:
        raise ConfigError("--needle: the prompt does not hold this text.")
    return [
        index
        for index, (start, end) in enumerate(offsets)
        if start < end and any(start < last and end > first for first, last in spans)
    ]

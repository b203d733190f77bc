"""Prompts for measurements: of a file, or needle prompts if there is none, as token ids."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_kvcompress.errors import ConfigError, config_error
from vllm_kvcompress.evaluation.tasks.needle import make_samples
from vllm_kvcompress.evaluation.text_files import check_text, json_lines, read_text

SEED = 0

Prompt = str | list[int]


def read_prompts(
    model: Path, path: Path | None, length: int | None, count: int | None
) -> list[list[int]]:
    """Token ids of prompts.

    Parameters
    ----------
    model : Path
        Folder with the tokenizer; a file of token ids needs none.
    path : Path or None
        A text per line; in a ``.jsonl`` file a text, a list of token ids, or an object with either
        as its field ``prompt``. Empty lines are skipped; lines end at line feeds alone. None:
        needle prompts.
    length : int or None
        A file's prompts are cut behind so many tokens. Needle prompts, which need a number, are
        made to fit.
    count : int or None
        How many; of a file, the first. Needle prompts need a number.

    Raises
    ------
    ConfigError
        If there is no prompt, or one that cannot be read, or no tokenizer.
    """
    if path is None:
        assert length is not None and count is not None
        encode = _tokenizer(model)
        try:
            return [encode(sample.prompt) for sample in make_samples(count, length, encode, SEED)]
        except ValueError as error:
            raise ConfigError(f"--prompt-len: {error}.") from None
    found = list(_lines(path))[:count]
    if not found:
        raise ConfigError(f"--prompts: {path} holds no prompt.")
    texts = any(isinstance(prompt, str) for prompt in found)
    encode = _tokenizer(model) if texts else len  # type: ignore[assignment]
    return [(encode(prompt) if isinstance(prompt, str) else prompt)[:length] for prompt in found]


def _lines(path: Path) -> Iterator[Prompt]:
    if path.suffix == ".jsonl":
        for number, found in json_lines(path):
            yield _prompt_of(found, f"{path}:{number}")
        return
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            check_text(line, f"{path}:{number}", "")
            yield line.removesuffix("\r")


def _prompt_of(found: Any, where: str) -> Prompt:
    prompt = found.get("prompt") if isinstance(found, dict) else found
    if isinstance(prompt, list) and prompt and all(type(each) is int for each in prompt):
        return prompt
    if not prompt or not isinstance(prompt, str):
        rule = (
            "holds no prompt; allowed are a text, a list of token ids, or an object with either as "
            "its field prompt"
        )
        raise config_error(where, "", rule)
    check_text(prompt, where, "prompt" if isinstance(found, dict) else "")
    return prompt


def _tokenizer(model: Path) -> Callable[[str], list[int]]:
    try:
        return AutoTokenizer.from_pretrained(str(model)).encode
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise ConfigError(
            f"--model: {model} holds no tokenizer ({first_line(error)}): give token ids by "
            "--prompts FILE.jsonl."
        ) from None


def first_line(error: Exception) -> str:
    """What an error says, without the lines of advice behind it."""
    return str(error).strip().partition("\n")[0].rstrip(". :") or type(error).__name__

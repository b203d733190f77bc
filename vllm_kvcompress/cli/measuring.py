"""What `kvcompress eval` and `kvcompress tune` share: lists of options, the tokenizer.

torch, transformers and vLLM are imported when a function needs them, not with this file.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.errors import ConfigError

if TYPE_CHECKING:
    from vllm_kvcompress.evaluation.quality.prompts import Prompter


def names(text: str) -> list[str]:
    """Type of an option that takes names with commas; each once, in their order."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError("names nothing")
    return list(dict.fromkeys(found))


def list_of(each: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Type of an option that takes several values of a type, with commas."""

    def values(text: str) -> list[Any]:
        try:
            return list(dict.fromkeys(each(part) for part in names(text)))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from None

    return values


def prompter_of(model: Path, use_template: bool) -> "Prompter":
    """Makes prompts with a model's tokenizer.

    Raises
    ------
    ConfigError
        If the folder holds none.
    """
    from transformers import AutoTokenizer

    from vllm_kvcompress.evaluation.quality.prompts import Prompter

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model))
    except (OSError, ValueError, ImportError, AttributeError) as error:
        line = str(error).strip().partition("\n")[0].rstrip(". :")
        raise ConfigError(f"--model: {model} holds no tokenizer ({line}).") from None
    return Prompter(tokenizer, use_template=use_template)

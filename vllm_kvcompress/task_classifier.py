"""WindowKV's task of a prompt: one thing to find in the text, or a job over all of it?

A linear model over hashed word and character n-grams of the prompt's two ends, where instructions
stand. WindowKV (arXiv 2503.17922) fine-tunes BERT for this; its weights and data are not public.
`scripts/train_task_classifier.py` trains this one; `docs/task-classifier.md` says how good it is.

An n-gram's bucket depends on its characters alone, never on Python's `hash`, the process or the
platform, so that the trained weights mean the same everywhere.
"""

import re
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

TASKS = ("localization", "aggregation")
EDGE_TOKENS = 256  # tokens of each end of the prompt that are looked at, as in the paper

FORMAT_VERSION = 1
WEIGHTS_FILE = "task_classifier.npz"
BUCKET_BITS = 17
NUM_BUCKETS = 1 << BUCKET_BITS

# A token of ordinary text has about 4 characters. The limit bounds the time per request where
# tokens are long runs of blanks or dashes.
MAX_CHARS = 2048

_LINE_BREAK = re.compile(r"\s*\n\s*")
_DIGITS = re.compile(r"\d+")
_REPEATED_MARK = re.compile(r"([^\w\s])\1+")
# A word, a line break, one mark, or one Chinese or Japanese character: these scripts put no
# blanks between words, and two such characters are about one word.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[^\W{_CJK}]+|[{_CJK}]|\n|[^\w\s]")

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd: spreads the high bits
_SALT_STEP = 0xD1B54A32D192ED03
_SHIFT = np.uint64(64 - BUCKET_BITS)
_NGRAM_LENGTHS = (3, 4, 5)

T = TypeVar("T", str, Sequence[int])


def head_and_tail(prompt: T, size: int = EDGE_TOKENS) -> tuple[T, T]:
    """Return the first and the last `size` items of a prompt: token ids, or characters.

    The tail comes first: a prompt of at most `size` items has an empty head, and one of at most
    twice that is split without overlap.
    """
    start = max(len(prompt) - size, 0)
    return prompt[: min(start, size)], prompt[start:]


def words_of(text: str) -> list[str]:
    """Return the words and marks of a text: lower case, numbers as 0, repeated marks once."""
    text = _LINE_BREAK.sub("\n", text.lower().replace(" ", " "))
    return _WORD.findall(_REPEATED_MARK.sub(r"\1", _DIGITS.sub("0", text)))

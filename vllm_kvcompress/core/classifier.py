"""WindowKV's task of a prompt: one thing to find in the text, or a job over all of it?

A linear model over hashed word and character n-grams of the prompt's two ends, where instructions
stand. WindowKV (arXiv 2503.17922) fine-tunes BERT for this; its weights and data are not public.
`scripts/train_task_classifier.py` trains this one; `docs/task-classifier.md` says how good it is.

An n-gram's bucket depends on its characters alone, never on Python's `hash`, the process or the
platform, so that the trained weights mean the same everywhere.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

TASKS = ("localization", "aggregation")
EDGE_TOKENS = 256  # tokens of each end of the prompt that are looked at, as in the paper

FORMAT_VERSION = 1
WEIGHTS_FILE = "classifier.npz"
BUCKET_BITS = 17
NUM_BUCKETS = 1 << BUCKET_BITS

# A token of ordinary text has about 4 characters. The limit bounds the time per request where
# tokens are long runs of blanks or dashes.
MAX_CHARS = 2048

# An n-gram 64 characters away from the prompt's end counts half: instructions are near the ends.
_HALF_DISTANCE = 64
_CHAR_WEIGHT = 0.3  # there are four times as many character n-grams as words
_CHAR_LENGTHS = (3, 4, 5)
_REPEAT_WEIGHT = 3.0  # one n-gram says "few-shot" against hundreds that look like a question

_CHAT_TOKEN = re.compile(r"<[|\uff5c][^|\uff5c<>\n]{1,40}[|\uff5c]>")
# From the first blank on: begun at every one of 2,000 blanks it would take 20 ms.
_LINE_BREAK = re.compile(r"(?<!\s)\s*\n\s*")
_DIGITS = re.compile(r"\d+")
_REPEATED_MARK = re.compile(r"([^\w\s])\1+")
# A word, one Chinese or Japanese character, a line break, or one mark. These scripts put no
# blanks between words, and two such characters are about one word.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[^\W{_CJK}]+|[{_CJK}]|\n|[^\w\s]")

# Words that no text has: the prompt's first and last one, and how often its last line's label
# was there before (few-shot prompts end with an example that lacks its answer).
_START, _END, _REPEATS = "\x02", "\x03", "\x04"
_LABEL_ENDS = frozenset(":=>-\uff1a")
_LAST_ROLES = frozenset(("assistant", "model", "response", "[", "#", "<"))

_MULTIPLIER = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: carries into the high bits
_SALT = 0xD1B54A32D192ED03
_MASK = (1 << 64) - 1

Prompt = TypeVar("Prompt", bound=Sequence[Any])


def head_and_tail(prompt: Prompt, size: int = EDGE_TOKENS) -> tuple[Prompt, Prompt]:
    """Return the first and the last `size` items of a prompt: token ids, or characters.

    The tail is filled first: a prompt of at most `size` items has an empty head, and one of at
    most twice that is split without overlap.
    """
    start = max(len(prompt) - size, 0)
    head: Any = prompt[: min(start, size)]
    tail: Any = prompt[start:]
    return head, tail


def words_of(text: str) -> list[str]:
    """Return the words and marks of a text: lower case, numbers as 0, repeated marks once."""
    text = _LINE_BREAK.sub("\n", _CHAT_TOKEN.sub("\n", text.lower()))
    return _WORD.findall(_REPEATED_MARK.sub(r"\1", _DIGITS.sub("0", text)))


def label_repeats(words: list[str]) -> int:
    """Return how many earlier lines begin like the last one, up to 3.

    Compared are a line's words up to its first colon or arrow, four at most.
    """
    lines: list[list[str]] = [[]]
    for word in words:
        if word == "\n":
            lines.append([])
        else:
            lines[-1].append(word)
    lines = [line for line in lines if line]
    while lines and lines[-1][0] in _LAST_ROLES:  # what a chat template adds
        lines.pop()
    if not lines:
        return 0
    last, size = lines.pop(), 1
    while size < min(len(last), 4) and last[size - 1] not in _LABEL_ENDS:
        size += 1
    return min(sum(line[:size] == last[:size] for line in lines), 3)


def _buckets(hashes: npt.NDArray[np.uint64], kind: int) -> npt.NDArray[np.uint64]:
    """Map hashes of one kind of n-gram to buckets; each kind has a salt of its own."""
    mixed = (hashes ^ np.uint64(kind * _SALT & _MASK)) * np.uint64(_MULTIPLIER)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(_MULTIPLIER)
    return mixed >> np.uint64(64 - BUCKET_BITS)


def _ngrams(text: str, is_tail: bool) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64]]:
    """Return bucket and value of every n-gram of one end, repeated ones too."""
    text = text[-MAX_CHARS:] if is_tail else text[:MAX_CHARS]
    words = words_of(text)
    words = [*words, _REPEATS + str(label_repeats(words)), _END] if is_tail else [_START, *words]
    kind = 16 if is_tail else 0
    joined = f" {' '.join(words)} ".encode("utf-32-le", "surrogatepass")
    chars = np.frombuffer(joined, "<u4").astype(np.uint64)
    blank = chars == ord(" ")
    word_starts = np.flatnonzero(blank)[:-1]
    multiplier = np.uint64(_MULTIPLIER)

    hashes = np.array([zlib.crc32(w.encode("utf-8", "surrogatepass")) for w in words], np.uint64)
    buckets = [_buckets(hashes, kind + 1)]
    buckets.append(_buckets(hashes[:-1] * multiplier + hashes[1:], kind + 2))
    places = [word_starts, word_starts[:-1]]

    grams = chars[:-1] * multiplier + chars[1:]
    inside = ~blank  # n-grams do not reach over a blank, but may begin and end with one
    for length in _CHAR_LENGTHS:
        count = max(len(chars) - length + 1, 0)
        grams = grams[:count] * multiplier + chars[length - 1 :]
        whole = np.ones(count, bool)
        for offset in range(1, length - 1):
            whole &= inside[offset : offset + count]
        places.append(np.flatnonzero(whole))
        buckets.append(_buckets(grams[places[-1]], kind + length))

    place = np.concatenate(places)
    distance = len(chars) - 1 - place if is_tail else place
    values = _HALF_DISTANCE / (_HALF_DISTANCE + distance)
    values[len(places[0]) + len(places[1]) :] *= _CHAR_WEIGHT
    if is_tail:
        values[len(words) - 2] *= _REPEAT_WEIGHT
    return np.concatenate(buckets), values


def features(head: str, tail: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the buckets of a prompt, ascending and each once, and their values.

    Head and tail have buckets of their own. A value falls with the distance from the prompt's
    start or end; of a repeated n-gram the largest counts. The values' squares sum to 1.
    """
    ends = [_ngrams(head, False), _ngrams(tail, True)]
    # Bucket and falling value in one integer: one sort brings the largest of each bucket first.
    # Values are at most 3.
    steps = np.concatenate([np.rint(values * 16383) for _, values in ends]).astype(np.uint64)
    keys = np.concatenate([buckets for buckets, _ in ends]) << np.uint64(16)
    keys = np.sort(keys | (np.uint64(65535) - steps))
    buckets = (keys >> np.uint64(16)).astype(np.int64)
    first = np.concatenate(([True], buckets[1:] != buckets[:-1]))
    values = 65535.0 - (keys[first] & np.uint64(65535))
    return buckets[first], values / np.sqrt(values @ values)


@dataclass(frozen=True)
class TaskClassifier:
    """A linear model over `features`.

    Parameters
    ----------
    weights : ndarray of int8, [NUM_BUCKETS]
        Positive where the n-gram speaks for localization.
    scale : float
        What a weight of 1 stands for.
    bias : float
        Added to every margin.
    """

    weights: npt.NDArray[np.int8]
    scale: float
    bias: float

    @classmethod
    def load(cls) -> "TaskClassifier":
        """Read the weights that come with the package."""
        path = resources.files("vllm_kvcompress.core") / WEIGHTS_FILE
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            if int(data["version"]) != FORMAT_VERSION or data["weights"].shape != (NUM_BUCKETS,):
                raise ValueError(f"{WEIGHTS_FILE}: not weights of format {FORMAT_VERSION}.")
            return cls(data["weights"], float(data["scale"]), float(data["bias"]))

    def margin(self, head: str, tail: str) -> float:
        """Return how clearly the prompt is localization; below 0 it is aggregation.

        Parameters
        ----------
        head, tail : str
            The decoded parts that `head_and_tail` returns.
        """
        buckets, values = features(head, tail)
        return float(values @ self.weights[buckets]) * self.scale + self.bias

    def classify(self, head: str, tail: str) -> str:
        """Return the one of `TASKS` that the prompt is; the arguments are `margin`'s."""
        return TASKS[0] if self.margin(head, tail) > 0 else TASKS[1]

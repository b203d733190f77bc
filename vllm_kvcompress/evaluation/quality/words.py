"""Words and numbers for generated tasks, the same for the same seed on every machine.

The only source of chance is ``random.Random(text).random()``: Python promises its sequence.
"""

import random
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

FEWEST_WORDS = 400
_SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
FIRST_NAMES = (
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas",
    "Karla", "Leon", "Maria", "Nils", "Olga", "Peter", "Rosa", "Simon", "Tessa", "Victor",
)  # fmt: skip
LAST_NAMES = (
    "Abel", "Brandt", "Carver", "Dorsey", "Engel", "Foster", "Grimm", "Hollis", "Ingram", "Jarvis",
    "Keller", "Lindner", "Marsh", "Norris", "Ortega", "Palmer", "Quinn", "Ritter", "Sutton",
    "Turner",
)  # fmt: skip


def chance(*parts: object) -> random.Random:
    """A source of chance that depends on `parts` alone."""
    return random.Random("/".join(map(str, parts)))


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of `items`."""
    return items[int(rng.random() * len(items))]


def pick_many(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """`count` different places of `items`, in random order.

    Raises
    ------
    ValueError
        If there are fewer.
    """
    if count > len(items):
        raise ValueError(f"{count} of {len(items)} items were asked for")
    left = list(items)
    return [left.pop(int(rng.random() * len(left))) for _ in range(count)]


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """All `items` in random order."""
    return pick_many(rng, items, len(items))


def number(rng: random.Random, num_digits: int) -> str:
    """A number of so many digits that does not begin with 0."""
    return pick(rng, "123456789") + "".join(pick(rng, "0123456789") for _ in range(num_digits - 1))


def words_of(tokenizer: Any) -> list[str]:
    """Lower-case words that the tokenizer has a token of its own for, in alphabetical order.

    RULER takes its words from a list of English ones; these are words that the model knows, in
    whatever language it was trained on. A vocabulary without enough of them gives made-up words
    of three syllables.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Of Hugging Face.
    """
    found = set()
    for token in tokenizer.get_vocab():
        text = tokenizer.convert_tokens_to_string([token])
        word = text[1:] if text.startswith(" ") else token.removeprefix("▁")
        is_whole = text.startswith(" ") or token.startswith("▁")
        if is_whole and word.isascii() and word.isalpha() and word.islower() and 4 < len(word) < 10:
            found.add(word)
    if len(found) < FEWEST_WORDS:
        rng = chance("syllables")
        while len(found) < FEWEST_WORDS:
            found.add("".join(pick(rng, _SYLLABLES) for _ in range(3)))
    return sorted(found)

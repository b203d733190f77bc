"""The text in which needles are hidden: whole sentences, as many as fit into a prompt."""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import cycle, islice

from vllm_kvcompress.evaluation.quality.words import pick

STYLES = ("repeated", "prose")

_REPEATED = (
    "The road runs along the river.",
    "A cold wind blows from the north.",
    "Nothing moves in the valley.",
    "The lamps are lit at dusk.",
    "Then it is quiet again.",
)
# Every brace is filled from the list of that name below.
_TEMPLATES = (
    "The {person} {did} the {quality} {thing} {place}.",
    "{time} a {person} came {place} with a {quality} {thing}.",
    "Nobody knew why the {thing} had been {done} {place}.",
    "It was the {person} who {did} the {thing}, not the {person}.",
    "The {thing} was {quality}, so the {person} {did} it again {place}.",
    "{time} the {quality} {thing} was {done} by a {person}.",
    "Some said that the {person} had {done} every {thing} {place}.",
    "There was a {quality} {thing} {place}, and the {person} {did} it.",
    "The {person} asked whether the {thing} could be {done} {place}.",
    "After the {thing} was {done}, the {person} waited {place}.",
)
_LISTS = {
    "person": ("baker", "captain", "clerk", "doctor", "farmer", "gardener", "judge", "miller",
               "painter", "sailor", "shepherd", "teacher", "visitor", "watchman"),
    "thing": ("barrel", "basket", "boat", "bridge", "chair", "clock", "cupboard", "fence", "gate",
              "ladder", "letter", "map", "table", "wagon", "window"),
    "quality": ("broken", "empty", "heavy", "narrow", "new", "old", "painted", "round", "small",
                "wooden"),
    "did": ("brought", "carried", "cleaned", "found", "moved", "repaired", "sold", "wanted"),
    "done": ("carried away", "forgotten", "left", "measured", "moved", "repaired", "seen", "sold"),
    "place": ("at the harbour", "behind the church", "by the well", "in the market",
              "near the mill", "on the hill", "outside the town", "under the bridge"),
    "time": ("At noon", "Before the rain", "Every winter", "In spring", "Late in the evening",
             "One morning", "That summer", "Years later"),
}  # fmt: skip


def sentences(rng: random.Random, style: str) -> Iterator[str]:
    """Sentences without end, in one of `STYLES`.

    "repeated" goes round five sentences, so that nothing but the needles is new; "prose" hardly
    ever says the same twice.
    """
    if style == "repeated":
        yield from cycle(_REPEATED)
    while True:
        pieces = pick(rng, _TEMPLATES).split("{")
        text = pieces[0]
        for piece in pieces[1:]:
            name, rest = piece.split("}")
            text += pick(rng, [each for each in _LISTS[name] if each not in text]) + rest
        yield text


def as_many_as_fit(
    stream: Iterator[str], num_tokens: int, length: Callable[[list[str]], int]
) -> list[str]:
    """The first items of a stream, as many as make a prompt of at most `num_tokens` tokens.

    Parameters
    ----------
    stream : Iterator[str]
        Without end.
    num_tokens : int
        Longest allowed prompt.
    length : Callable[[list[str]], int]
        Tokens of the prompt with such items; grows with them.

    Raises
    ------
    ValueError
        If the prompt is too long without any item.
    """
    shortest = length([])
    if shortest > num_tokens:
        raise ValueError(f"the shortest prompt has {shortest} tokens, allowed are {num_tokens}")
    items = list(islice(stream, 64))
    while length(items) <= num_tokens:
        items += islice(stream, len(items))
    count = bisect_right(range(1, len(items)), num_tokens, key=lambda size: length(items[:size]))
    return items[:count]


def spread(items: list[str], inserts: list[str], places: list[float]) -> list[str]:
    """`items` with every insert at a place from 0 (in front) to 1 (at the end), in this order."""
    marked = [(index, 1, text) for index, text in enumerate(items)]
    marked += [
        (round(place * len(items)), 0, text)
        for place, text in sorted(zip(places, inserts, strict=True), key=lambda pair: pair[0])
    ]
    marked.sort(key=lambda entry: entry[:2])  # stable: equal places keep their order
    return [text for _, _, text in marked]

"""Needle retrieval: one seven-digit number hidden in a long text, and a question about it.

Only the standard library is needed, so that other engines' tools can make the very same prompts.
Nothing here depends on the Python version: the only source of chance is
``random.Random(int).random()``, whose sequence Python promises to keep.

A prompt has three lines::

    <introduction>
    <filler sentence> ... <needle sentence> ... <filler sentence>
    <question, ending where the number must follow>
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

STYLES = ("noise", "english")

_INTRODUCTION = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards."
)
_NEEDLE = "One of the special magic numbers for {key} is: {answer}."
_QUESTION = (
    "What is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
_NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
# Short sentences for the gap that the last long sentence leaves; the noise is short as it is.
_CLOSERS = {"noise": (), "english": ("This is the default.", "It is not used.", "See below.")}

_KEY_ADJECTIVES = ("bright", "clever", "lovely", "witty", "healthy", "wealthy", "calm", "lucky")
_KEY_NOUNS = ("otter", "falcon", "river", "maple", "harbor", "lantern", "meadow", "comet")

# The English filler: every brace is filled from the list of that name below.
_TEMPLATES = (
    "The {thing} returns the {quality} {part} of the {thing}.",
    "If the {part} is {quality}, the {thing} is {done}.",
    "This {thing} can be {done} by the {person} at any time.",
    "The {person} may use the {quality} {part} of this {thing} for any purpose.",
    "Each {part} is {done} before the {thing} is {done}.",
    "The {quality} {thing} has no {part} and is {done} as it is.",
    "When the {thing} is {done}, its {part} is passed to the {person}.",
    "The {person} must not change the {part} without a copy of the {thing}.",
    "Both the {part} and the {part} are {done} with the {quality} {thing}.",
    "It is up to the {person} to say how the {thing} is {done}.",
)
_WORDS = {
    "thing": ("file", "module", "function", "package", "list", "class", "message", "license",
              "program", "library", "string", "object"),
    "part": ("name", "value", "first line", "type", "source code", "notice", "default", "number",
             "header", "argument"),
    "quality": ("given", "new", "empty", "same", "local", "current", "other", "original"),
    "done": ("read", "written", "used", "called", "copied", "returned", "created", "removed"),
    "person": ("user", "author", "caller", "owner", "reader", "contributor"),
}  # fmt: skip


@dataclass(frozen=True)
class NeedleSample:
    """One prompt and its answer.

    Parameters
    ----------
    prompt : str
        The whole text given to the model; the seven digits follow it, after a space.
    answer : str
        The seven digits, all different.
    needle : str
        The sentence of the prompt that holds the answer; it appears once.
    depth : float
        Where the needle is among the filler sentences: 0 right after the introduction, 1 right
        before the question.
    style : str
        Kind of filler, one of `STYLES`.
    num_tokens : int
        Length of the prompt as the given tokenizer counts it.
    """

    prompt: str
    answer: str
    needle: str
    depth: float
    style: str
    num_tokens: int


def make_samples(
    num_samples: int,
    num_tokens: int,
    tokenize: Callable[[str], list[int]],
    seed: int = 0,
) -> list[NeedleSample]:
    """Make prompts of one length with needles at evenly spaced depths.

    The styles take turns. The same arguments give the same samples everywhere. A prompt is filled
    with whole sentences, so it ends a few tokens below `num_tokens` where it cannot reach it.

    Parameters
    ----------
    num_samples : int
        How many samples; one sample alone gets depth 0.5.
    num_tokens : int
        Longest allowed prompt, in tokens.
    tokenize : Callable[[str], list[int]]
        Text to token ids, special tokens included if the model is given them.
    seed : int, default=0
        Another seed gives other numbers, keys and English filler.

    Returns
    -------
    list[NeedleSample]
        The samples, by rising depth.

    Raises
    ------
    ValueError
        If a count is not positive, the seed is negative, or `num_tokens` cannot hold the
        introduction, the needle, the question and one filler sentence.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    samples = []
    for index in range(num_samples):
        depth = index / (num_samples - 1) if num_samples > 1 else 0.5
        rng = random.Random(seed * 1_000_003 + index)
        style = STYLES[index % len(STYLES)]
        samples.append(_make_sample(rng, depth, style, num_tokens, tokenize))
    return samples


def needle_token_span(
    prompt: str, needle: str, offsets: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Find the tokens that hold the needle sentence.

    Parameters
    ----------
    prompt : str
        The text that was tokenized.
    needle : str
        The sentence to find; it must appear exactly once.
    offsets : Sequence[tuple[int, int]]
        For each token its [start, end) characters in `prompt`; special tokens have an empty range,
        as Hugging Face's ``return_offsets_mapping=True`` gives them.

    Returns
    -------
    tuple[int, int]
        First token that overlaps the needle and the one after the last: ``[start, end)`` in the
        tokenized prompt, special tokens counted.

    Raises
    ------
    ValueError
        If the needle does not appear exactly once, or no token covers any of it.
    """
    count = prompt.count(needle) if needle else 0
    if count != 1:
        raise ValueError(f"the needle must appear exactly once in the prompt, found {count}")
    first = prompt.index(needle)
    last = first + len(needle)
    inside = [
        index
        for index, (start, end) in enumerate(offsets)
        if start < end and start < last and end > first
    ]
    if not inside:
        raise ValueError("no token overlaps the needle: do the offsets belong to this prompt?")
    return inside[0], inside[-1] + 1


def is_right(generated: str, answer: str) -> bool:
    """Say whether a generated text starts with the answer, white space ignored.

    Parameters
    ----------
    generated : str
        What the model wrote after the prompt.
    answer : str
        The number of the sample.

    Returns
    -------
    bool
        True if the first characters that are not white space spell the answer.
    """
    return "".join(generated.split()).startswith(answer)


def _make_sample(
    rng: random.Random,
    depth: float,
    style: str,
    num_tokens: int,
    tokenize: Callable[[str], list[int]],
) -> NeedleSample:
    key = f"{_pick(rng, _KEY_ADJECTIVES)}-{_pick(rng, _KEY_NOUNS)}"
    answer = _pick_number(rng)
    needle = _NEEDLE.format(key=key, answer=answer)
    question = _QUESTION.format(key=key)

    def build(filler: list[str]) -> str:
        place = round(depth * len(filler))
        text = " ".join([*filler[:place], needle, *filler[place:]])
        return "\n".join((_INTRODUCTION, text, question))

    def length(filler: list[str]) -> int:
        return len(tokenize(build(filler)))

    stream = _filler_sentences(rng, style)
    sentences = [next(stream)]
    if length(sentences) > num_tokens:
        raise ValueError(
            f"num_tokens={num_tokens} is too short: a needle prompt with one filler sentence "
            f"has {length(sentences)} tokens"
        )
    while length(sentences) <= num_tokens and len(sentences) <= num_tokens:
        sentences += islice(stream, len(sentences))
    # As many sentences as fit: one does, all of them do not.
    num_fitting = bisect_right(
        range(1, len(sentences)), num_tokens, key=lambda size: length(sentences[:size])
    )
    filler = sentences[:num_fitting]
    for closer in 2 * _CLOSERS[style]:
        if length([*filler, closer]) <= num_tokens:
            filler.append(closer)
    prompt = build(filler)
    return NeedleSample(prompt, answer, needle, depth, style, len(tokenize(prompt)))


def _filler_sentences(rng: random.Random, style: str) -> Iterator[str]:
    if style == "noise":
        yield from cycle(_NOISE)
    while True:
        yield _english_sentence(rng)


def _english_sentence(rng: random.Random) -> str:
    pieces = _pick(rng, _TEMPLATES).split("{")
    text = pieces[0]
    for piece in pieces[1:]:
        name, rest = piece.split("}")
        text += _pick(rng, [word for word in _WORDS[name] if word not in text]) + rest
    return text


def _pick_number(rng: random.Random) -> str:
    # All digits differ: after a repeated digit a small model cannot tell which one it has just
    # copied, and the task is to find the number, not to spell it.
    digits = _pick(rng, "123456789")
    while len(digits) < 7:
        digits += _pick(rng, [digit for digit in "0123456789" if digit not in digits])
    return digits


def _pick(rng: random.Random, items: Sequence[str]) -> str:
    # Not rng.choice: only random() is promised to stay the same in later Python versions.
    return items[int(rng.random() * len(items))]

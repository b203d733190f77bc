"""Tasks that are made here at any length: RULER's families (arXiv 2404.06654), in words of our own.

Answers are not comparable with RULER's published tables digit by digit: the wording, the filler and
the words differ. What each family asks of a cache is the same.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from vllm_kvcompress.evaluation.quality.filler import STYLES, as_many_as_fit, sentences, spread
from vllm_kvcompress.evaluation.quality.sample import Sample
from vllm_kvcompress.evaluation.quality.words import (
    FIRST_NAMES,
    LAST_NAMES,
    chance,
    number,
    pick,
    pick_many,
    shuffled,
)

NUM_DIGITS = 7
NUM_NEEDLES = 4
NUM_HOPS = 4
NUM_PAIRS = 4
COMMON_WORDS, COMMON_TIMES, RARE_TIMES = 10, 30, 3
NUM_FREQUENT, ZETA = 3, 2.0


@dataclass(frozen=True)
class Order:
    """What a generator is asked for.

    Attributes
    ----------
    rng : random.Random
        Its only source of chance.
    num_tokens : int
        Longest allowed prompt, template and answer's beginning included.
    depth : float
        Where the needle is among the filler, 0 to 1.
    style : str
        Of the filler.
    words : Sequence[str]
        Words the model knows.
    count : Callable[[str, str, str], int]
        Tokens of a prompt with such a context, question and answer's beginning.
    """

    rng: random.Random
    num_tokens: int
    depth: float
    style: str
    words: Sequence[str]
    count: Callable[[str, str, str], int]


@dataclass(frozen=True)
class Draft:
    """What a generator makes of an order; `made` puts the rest of a `Sample` around it."""

    context: str
    question: str
    answers: list[str]
    answer_prefix: str
    has_depth: bool = False


def _fit(
    order: Order,
    stream: Iterator[str],
    build: Callable[[list[str]], str],
    question: str,
    answer_prefix: str,
) -> str:
    """The context with as much of a stream as the prompt has room for."""

    def length(items: list[str]) -> int:
        return order.count(build(items), question, answer_prefix)

    return build(as_many_as_fit(stream, order.num_tokens, length))


# --- needles ------------------------------------------------------------------------------

_INTRODUCTION = "Some sentences of this text give secret codes. Remember them.\n\n"


def _code(rng: random.Random) -> str:
    return number(rng, NUM_DIGITS)


def _needle(key: str, code: str) -> str:
    return f"The secret code of {key} is {code}."


def _in_filler(
    order: Order, needles: list[str], places: list[float], question: str, prefix: str
) -> str:
    def build(filler: list[str]) -> str:
        return _INTRODUCTION + " ".join(spread(filler, needles, places))

    return _fit(order, sentences(order.rng, order.style), build, question, prefix)


def _ask_one(key: str) -> tuple[str, str]:
    question = f"\n\nWhat is the secret code of {key}? Answer with the code alone."
    return question, f"The secret code of {key} is"


def niah_single(order: Order) -> Draft:
    """One key, one code."""
    key, code = pick(order.rng, order.words), _code(order.rng)
    question, prefix = _ask_one(key)
    context = _in_filler(order, [_needle(key, code)], [order.depth], question, prefix)
    return Draft(context, question, [code], prefix, has_depth=True)


def niah_multikey(order: Order) -> Draft:
    """Four keys with a code each; one is asked for."""
    keys = pick_many(order.rng, order.words, NUM_NEEDLES)
    codes = [_code(order.rng) for _ in keys]
    places = [order.depth, *(order.rng.random() for _ in keys[1:])]
    question, prefix = _ask_one(keys[0])
    needles = [_needle(*pair) for pair in zip(keys, codes, strict=True)]
    context = _in_filler(order, needles, places, question, prefix)
    return Draft(context, question, codes[:1], prefix, has_depth=True)


def niah_lines(order: Order) -> Draft:
    """Nothing but keys and codes; one is asked for."""
    keys = shuffled(order.rng, order.words)
    key, code = keys.pop(), _code(order.rng)
    question, prefix = _ask_one(key)

    def others() -> Iterator[str]:
        for other in _all_of(keys):
            yield _needle(other, _code(order.rng))

    def build(lines: list[str]) -> str:
        return _INTRODUCTION + "\n".join(spread(lines, [_needle(key, code)], [order.depth]))

    context = _fit(order, others(), build, question, prefix)
    return Draft(context, question, [code], prefix, has_depth=True)


def niah_multivalue(order: Order) -> Draft:
    """One key with four codes; all are asked for."""
    key, codes = pick(order.rng, order.words), [_code(order.rng) for _ in range(NUM_NEEDLES)]
    places = sorted(order.rng.random() for _ in codes)
    question = f"\n\nWhat are all the secret codes of {key}? Answer with the codes alone."
    prefix = f"The secret codes of {key} are"
    needles = [f"One of the secret codes of {key} is {code}." for code in codes]
    return Draft(_in_filler(order, needles, places, question, prefix), question, codes, prefix)


def niah_multiquery(order: Order) -> Draft:
    """Four keys with a code each; all are asked for."""
    keys = pick_many(order.rng, order.words, NUM_NEEDLES)
    codes = [_code(order.rng) for _ in keys]
    places = [order.rng.random() for _ in keys]
    named = f"{', '.join(keys[:-1])} and {keys[-1]}"
    question = f"\n\nWhat are the secret codes of {named}? Answer with the codes alone."
    prefix = f"The secret codes of {named} are"
    needles = [_needle(*pair) for pair in zip(keys, codes, strict=True)]
    return Draft(_in_filler(order, needles, places, question, prefix), question, codes, prefix)


# --- following a trail --------------------------------------------------------------------


def _names(rng: random.Random, count: int, num_letters: int) -> list[str]:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(pick(rng, letters) for _ in range(num_letters))] = None
    return list(found)


def variable_tracking(order: Order) -> Draft:
    """A chain of variables, each set to the one before; all of them are asked for."""
    names, value = _names(order.rng, NUM_HOPS + 1, 5), number(order.rng, 5)
    sources = [value, *names]
    steps = [f"Set {name} = {source}." for name, source in zip(names, sources, strict=False)]
    introduction = (
        "The text below sets variables. A variable may be set to another one and then has its "
        "value: after 'Set QQ = 12. Set RR = QQ.' the variables QQ and RR have the value 12.\n\n"
        "Text: "
    )
    question = f"\n\nWhich {len(names)} variables have the value {value}? Name all of them."
    prefix = f"The variables with the value {value} are"
    places = sorted(order.rng.random() for _ in steps)

    def build(filler: list[str]) -> str:
        return introduction + " ".join(spread(filler, steps, places))

    context = _fit(order, sentences(order.rng, order.style), build, question, prefix)
    return Draft(context, question, names, prefix)


def two_facts(order: Order) -> Draft:
    """Where a person lives and who is mayor there, in two sentences among others of the kind."""
    rng = order.rng
    people = pick_many(rng, [f"{a} {b}" for a in FIRST_NAMES for b in LAST_NAMES], 2 * NUM_PAIRS)
    towns = [word.capitalize() for word in pick_many(rng, order.words, NUM_PAIRS)]
    residents, mayors = people[:NUM_PAIRS], people[NUM_PAIRS:]
    facts = [
        f"{who} lives in the town of {town}." for who, town in zip(residents, towns, strict=True)
    ]
    facts += [f"The mayor of {town} is {who}." for who, town in zip(mayors, towns, strict=True)]
    places = [rng.random() for _ in facts]
    question = f"\n\nWho is the mayor of the town where {residents[0]} lives?"
    prefix = f"The mayor of the town where {residents[0]} lives is"

    def build(filler: list[str]) -> str:
        return "This text tells where people live.\n\n" + " ".join(spread(filler, facts, places))

    context = _fit(order, sentences(rng, order.style), build, question, prefix)
    return Draft(context, question, mayors[:1], prefix)


# --- the whole text counts ----------------------------------------------------------------


def common_words(order: Order) -> Draft:
    """Ten words that appear 30 times each, among others that appear 3 times."""
    shuffle = shuffled(order.rng, order.words)
    common, rare = shuffle[:COMMON_WORDS], shuffle[COMMON_WORDS:]
    question = f"\n\nWhich {COMMON_WORDS} words appear most often in the list?"
    prefix = "The words that appear most often are:"

    def build(others: list[str]) -> str:
        times = max(min(COMMON_TIMES, len(others) * RARE_TIMES // COMMON_WORDS), RARE_TIMES + 2)
        listed = shuffled(chance("list", len(others)), common * times + others * RARE_TIMES)
        numbered = " ".join(f"{place}. {word}" for place, word in enumerate(listed, start=1))
        return "Here is a numbered list of words.\n\n" + numbered

    context = _fit(order, _all_of(rare), build, question, prefix)
    return Draft(context, question, common, prefix)


def frequent_words(order: Order) -> Draft:
    """Made-up words whose frequencies fall as 1 / rank**2; the three most frequent ones."""
    coded = [word.lower() for word in _names(order.rng, 200, 6)]
    question = f"\n\nWhich {NUM_FREQUENT} coded words appear most often in the text?"
    prefix = "The coded words that appear most often are:"
    weights = [rank**-ZETA for rank in range(1, len(coded) + 1)]

    def build(items: list[str]) -> str:
        total = len(items)
        times = [max(round(total * weight / sum(weights)), 1) for weight in weights]
        # Equal counts at the top would make the answer a matter of chance.
        for place in range(NUM_FREQUENT - 1, -1, -1):
            times[place] = max(times[place], times[place + 1] + 1)
        listed = list(chain.from_iterable([w] * n for w, n in zip(coded, times, strict=True)))
        listed = shuffled(chance("coded", total), listed[: max(total, sum(times[:6]))])
        return "This is a text of coded words.\n\n" + " ... ".join(listed)

    context = _fit(order, repeat(""), build, question, prefix)
    most = Counter(context.partition("\n\n")[2].split(" ... ")).most_common(NUM_FREQUENT)
    return Draft(context, question, [word for word, _ in most], prefix)


def _all_of(words: Iterable[str]) -> Iterator[str]:
    count = 0
    for count, word in enumerate(words, start=1):  # noqa: B007
        yield word
    raise ValueError(f"the tokenizer has only {count} words, too few for so long a prompt")


# --- samples ------------------------------------------------------------------------------

FAMILIES: dict[str, Callable[[Order], Draft]] = {
    "niah_single": niah_single,
    "ruler_multikey": niah_multikey,
    "ruler_lines": niah_lines,
    "ruler_multivalue": niah_multivalue,
    "ruler_multiquery": niah_multiquery,
    "ruler_vt": variable_tracking,
    "ruler_cwe": common_words,
    "ruler_fwe": frequent_words,
    "ruler_qa": two_facts,
}
GROUPS = {
    "niah": ("niah_single",),
    "ruler": tuple(FAMILIES),
}
"""Names for several families."""


def generated_sample(
    family: str,
    num_tokens: int,
    index: int,
    num_depths: int,
    seed: int,
    words: Sequence[str],
    count: Callable[[str, str, str], int],
    tokens: Callable[[str], int],
) -> Sample:
    """One sample of a family and length; the same arguments give the same sample.

    Parameters
    ----------
    family : str
        One of `FAMILIES`.
    num_tokens : int
        Longest allowed prompt.
    index, num_depths : int
        Which sample; needles go round so many depths from 0 to 1, styles of the filler take turns.
    seed : int
        Another seed gives other samples.
    words, count
        As in `Order`.
    tokens : Callable[[str], int]
        Tokens of a text.

    Raises
    ------
    ValueError
        If a prompt of so many tokens has no room for the task.
    """
    depth = index % num_depths / (num_depths - 1) if num_depths > 1 else 0.5
    order = Order(
        rng=chance(seed, family, num_tokens, index),
        num_tokens=num_tokens,
        depth=depth,
        style=STYLES[index // num_depths % len(STYLES)],
        words=words,
        count=count,
    )
    draft = FAMILIES[family](order)
    return Sample(
        name=f"{num_tokens}-{index}",
        task=family,
        context=draft.context,
        question=draft.question,
        answers=tuple(draft.answers),
        metric="all_in",
        # What the answers take, and a word in between.
        max_tokens=tokens(" and ".join(draft.answers)) + 2 * len(draft.answers),
        answer_prefix=draft.answer_prefix,
        length=num_tokens,
        depth=depth if draft.has_depth else None,
    )

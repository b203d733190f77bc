"""Contexts for generated instructions: texts of many kinds, the same kinds for both classes.

A context must not give the class of its instruction away, so both classes draw from the same
pools, and the sentences also hold words of instructions ("summary", "question", "answer") as mere
topics. Train and held-out prompts share no noun, name, sentence frame or question frame.

The only source of chance is ``random.Random(int).random()``, whose sequence Python promises to
keep: the same seed gives the same text everywhere.
"""

import random
import re
from collections.abc import Sequence

from lab.classifier import texts

# Frames of one part of a context; a context repeats one frame, or one block of code after another.
CONTEXTS: dict[str, tuple[str, ...]] = {
    "prose": ("{paragraph}\n\n", "{paragraph}\n", "{paragraph} "),
    "story": (
        '{paragraph}\n\n"{sentence}" {said|whispered|cried|asked} {name}. {sentence}\n\n',
        "{sentence} {sentence} {name} {looked up|said nothing|laughed}. {sentence}\n\n",
        "CHAPTER {i}\n\n{paragraph} {paragraph}\n\n",
    ),
    "passages": (
        "Passage {i}:\n{adj} {noun}\n{paragraph}\n\n",
        "Document {i}:\n{paragraph}\n\n",
        "Source #{i}\n{paragraph}\n\n",
        "[{i}] {person}. {paragraph}\n",
        "Document [{i}](Title: {adj} {noun}) {paragraph}\n",
        "--- file {i} ---\n{paragraph}\n",
        "<doc id={i}>\n{paragraph}\n</doc>\n",
        "Article {i}\n{paragraph} {paragraph}\n\n",
        "Excerpt {i} - {noun} of {place}: {paragraph}\n",
    ),
    "paragraphs": (
        "Paragraph {i}: {paragraph}\n\n",
        "{i}. {paragraph}\n",
        "Section {i}\n{paragraph}\n\n",
    ),
    "dialogue": ("{name}: {sentence}\n", "{name}: {sentence} {sentence}\n", "- {sentence}\n"),
    "transcript": (
        "[{time}] Speaker {num}: {paragraph}\n",
        "{surname}: {paragraph}\n",
        "{name} {surname} ({org}): {paragraph}\n\n",
    ),
    "log": (
        "{date} {time} {INFO|WARN|ERROR|DEBUG} {noun}.{noun}: {sentence}\n",
        "[{time}] <{noun}> {verb} id={hex} code={num}\n",
        "{date}T{time}Z {noun}-{num} {noun}[{num}]: {noun} {verb} ({num} ms)\n",
    ),
    "table": (
        "| {person} | {noun} | {num} | {date} |\n",
        "{noun},{num},{num},{place}\n",
        "{name}\t{org}\t{year}\t{num}\n",
        "{noun};{adj};{num};{yes|no}\n",
    ),
    "code": ("{python}\n\n", "{braces}\n\n", "{python}\n"),
    "list": ("- {adj} {noun} of {place}\n", "* {sentence}\n", "{i}) {adj} {noun}: {num}\n"),
    "words": ("{noun} ", "{i}. {noun} ", "{noun} {adj} ", "{hex} ", "{noun}\n", "{num}, "),
    "mail": (
        "From: {person}\nTo: {person}\nDate: {date} {time}\nSubject: {adj} {noun}\n\n"
        "{Hi|Dear|Hello} {name},\n\n{paragraph}\n\n{Best|Regards|Thanks},\n{name}\n\n",
        "> {sentence}\n> {sentence}\n\nOn {date}, {person} wrote:\n{paragraph}\n",
    ),
    "records": (
        '{lb}"id": "{hex}", "{noun}": "{adj} {noun}", "{noun}": {num}{rb},\n',
        "{noun}: {phrase}\n{noun}: {num}\n",
        '"{hex}": "{hex}",\n',
        "{noun} = {num}\n",
    ),
    "sections": (
        "## {num}.{num} {adj} {noun}\n\n{paragraph}\n\n{paragraph}\n\n",
        "ARTICLE {i}. {noun}\n{paragraph}\n",
        "{noun}\n=====\n{paragraph}\n\n",
    ),
    "faq": (
        "Q: {other}\nA: {sentence}\n\n",
        "{other}\n{paragraph}\n\n",
        "User: {other}\nAssistant: {sentence}\n",
    ),
    "reviews": (
        "Review {i} ({num} of 5 stars): {paragraph}\n",
        "{name} wrote on {date}:\n{sentence}\n\n",
        "{sentence} ({name}, {place})\n",
    ),
    "de": ("{de} {de} {de}\n\n", "{de} "),
    "fr": ("{fr} {fr} {fr}\n\n", "{fr} "),
    "es": ("{es} {es} {es}\n\n", "{es} "),
    "zh": ("{zh}{zh}{zh}\n", "{zh}"),
}
_ANY = tuple(kind for kind in CONTEXTS if len(kind) > 2) + ("prose", "prose", "passages")

_POOLS: dict[str, Sequence[str]] = {
    **{name: words.split() for name, words in texts.sections("words").items()},
    **texts.pools("foreign"),
    "frame": texts.lines("sentences"),
    "other": texts.lines("questions"),
    "python": texts.blocks("python"),
    "braces": texts.blocks("braces"),
    "phrase": ("{adj} {noun}", "{noun} of {place}", "{person}"),
    "person": ("{name}", "{name} {surname}", "{name} {surname}"),
}
# Drawn once per prompt: an instruction may say the question twice, or ask for a key again.
_FIXED = {"question": "other", "key": "hex", "magic": "noun", "who": "person"}
_FIXED |= {f"{code}_asked": f"{code}_question" for code in ("de", "fr", "es", "zh")}

_SLOT = re.compile(r"\{([^{}]*)\}")
# One syllable of an invented word: one entry of each.
_SYLLABLE = (
    "b c d f g h k l m n p r s t v w z br ch cl dr fl gr pl sh st th tr",
    "a e i o u ai ea ee oo ou",
    " n r l s t m nd ck st ng",
)


def share(items: Sequence[str], split: str) -> tuple[str, ...]:
    """Return the split's own part of a pool: two thirds for training, one third held out."""
    return tuple(item for i, item in enumerate(items) if (i % 3 == 2) == (split == "heldout"))


class TextSource:
    """Draws words, questions and contexts of one split.

    Parameters
    ----------
    seed : int
        The same seed gives the same texts.
    split : str
        "train" or "heldout": which words and frames to use.
    """

    def __init__(self, seed: int, split: str) -> None:
        self._random = random.Random(seed).random
        self._pools = {name: share(items, split) for name, items in _POOLS.items()}
        if split == "train":
            self._pools |= texts.pools("instruction_words")
            self._pools["global"] = texts.lines("whole_questions")
        self._contexts = CONTEXTS | {"passages": share(CONTEXTS["passages"], split)}
        self._fixed: dict[str, str] = {}

    def below(self, limit: int) -> int:
        """Return a whole number in [0, limit)."""
        return int(self._random() * limit)

    def pick(self, items: Sequence[str]) -> str:
        """Return one of the items."""
        return items[self.below(len(items))]

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self._random() < probability

    def new_prompt(self) -> None:
        """Forget the last prompt's question, key and person."""
        self._fixed = {}

    def fill(self, template: str) -> str:
        """Fill the braces: ``{a|b}`` is one of the alternatives, ``{noun}`` a word of that kind.

        ``{question}``, ``{ask}`` (the same in lower case), ``{key}``, ``{magic}`` and ``{who}``
        do not change within a prompt. ``{lb}`` and ``{rb}`` are braces.
        """
        while (filled := _SLOT.sub(lambda match: self._slot(match[1]), template)) != template:
            template = filled
        return template.replace("\0", "{").replace("\1", "}")

    def context(self, kind: str, size: int) -> str:
        """Return about `size` characters of a kind of `CONTEXTS`, or of "any"."""
        kind = self.pick(_ANY) if kind == "any" else kind
        return self.repeat(self.pick(self._contexts[kind]), size)

    def repeat(self, frame: str, size: int) -> str:
        """Return about `size` characters of one frame filled again and again."""
        parts: list[str] = []
        length = 0
        while length < size:
            parts.append(self.fill(frame.replace("{i}", str(len(parts) + 1))))
            length += len(parts[-1])
        return "".join(parts).strip()

    def _slot(self, name: str) -> str:
        if "|" in name:
            return self.pick(name.split("|"))
        if name == "ask":
            question = self._slot("question")
            return question[:1].lower() + question[1:]
        if name in _FIXED:
            if name not in self._fixed:
                self._fixed[name] = self.fill(self._slot(_FIXED[name]))
            return self._fixed[name]
        # Invented words keep the model from learning the few words that are listed.
        if name in ("noun", "name", "surname") and self.chance(0.15):
            word = self._invented_word()
            return word if name == "noun" else word.capitalize()
        if name in self._pools:
            return self.pick(self._pools[name])
        return str(getattr(self, f"_{name}")())

    def _invented_word(self) -> str:
        syllables = range(1 + self.below(3))
        return "".join(self.pick(part.split(" ")) for _ in syllables for part in _SYLLABLE)

    # One method for each brace that is not a word or a frame.
    def _lb(self) -> str:
        return "\0"

    def _rb(self) -> str:
        return "\1"

    def _num(self) -> int:
        return 2 + self.below(30 + 400 * self.below(3))

    def _big(self) -> int:
        return 1_000_000 + self.below(9_000_000)

    def _hex(self) -> str:
        return f"{self.below(1 << 48):012x}"

    def _year(self) -> int:
        return 1890 + self.below(136)

    def _time(self) -> str:
        return f"{self.below(24):02}:{self.below(60):02}"

    def _date(self) -> str:
        return f"20{10 + self.below(16)}-{1 + self.below(12):02}-{1 + self.below(28):02}"

    def _sentence(self) -> str:
        text = self.fill(self.pick(self._pools["frame"]))
        end = "" if text[-1] in ".?\"'" else "."
        return text[:1].upper() + text[1:] + end

    def _paragraph(self) -> str:
        return " ".join(self._sentence() for _ in range(2 + self.below(5)))

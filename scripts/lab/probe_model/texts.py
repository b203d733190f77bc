"""Texts with hidden numbers: sentences, tokenizer, training sequences and prompts."""

import ast
import random
import re
import sysconfig
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HEADER = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards."
)
NEEDLE = "One of the special magic numbers for {key} is: {number}."
QUESTION = (
    "What is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]  # ids 0, 1, 2
NUM_DIGITS = 7
ADJECTIVES = (
    "able bold brave brief bright calm clever cosy curly dusty eager fancy gentle giant golden "
    "happy humble jolly lively lonely lucky mighty modest noble proud quick quiet rare rusty shiny "
    "simple sleepy smooth steady stormy strong sunny swift tiny vivid"
)
NOUNS = (
    "acorn anchor apple arrow badger basket beacon bridge camel candle castle cedar comet copper "
    "desert dolphin eagle ember falcon fern fox garden hammer heron island jacket kettle lantern "
    "lemon maple meadow mirror ocean olive orchid otter owl pebble piano pillow planet raven "
    "river rocket saddle shadow spider temple tiger tulip valley violin walnut willow zebra"
)
KEYS = [f"{adjective}-{noun}" for adjective in ADJECTIVES.split() for noun in NOUNS.split()]

IGNORE, TEXT, ANSWER = 0, 1, 2  # role of a token: no loss, small weight, full weight


def docstring_sentences(max_files: int | None = None) -> list[str]:
    """Return the distinct English sentences in the standard library's docstrings, in file order.

    Sentences with three or more digits in a row are left out, so that nothing but the hidden
    number looks like one.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
    files = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    sentences: dict[str, None] = {}
    for path in files[:max_files]:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join((text or "").split())):
                if re.fullmatch(r"[A-Z](?!.*\d{3})[ -~]{28,238}[.!?]", sentence):
                    sentences[sentence] = None
    return list(sentences)


def train_tokenizer(sentences: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer in which every digit is a token of its own."""
    prompts = [
        "\n".join([HEADER, NOISE, f"{NEEDLE} {NEEDLE}", QUESTION]).format(key=key, number=7)
        for key in KEYS
    ]
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([f"{s} {s}" for s in sentences] + prompts, trainer)
    bos = SPECIAL_TOKENS[0]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class TextSource:
    """Draws training sequences and prompts from one stream of random numbers.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
        Tokenizer with one token per digit.
    sentences : list of str
        Filler for the documents; half of the documents use the noise line instead.
    seed : int
        Seed of the stream; training and held-out sources use different ones.
    """

    def __init__(self, tokenizer: Any, sentences: list[str], seed: int):
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.sentences = [(s, self._size(" " + s)) for s in sentences]
        self.noise = [(NOISE, self._size(" " + NOISE))]
        self.digits = [tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)]
        self.space, self.dot = tokenizer.convert_tokens_to_ids(["Ġ", "."])
        reserved = {self.space, self.dot, *self.digits}
        self.words = [i for i in range(len(SPECIAL_TOKENS), len(tokenizer)) if i not in reserved]

    def _size(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def dense(self, length: int) -> tuple[list[int], list[int]]:
        """Return ids and roles of random key-value pairs followed by the same pairs, shuffled."""
        rng, pairs, size = self.rng, [], 1
        while True:
            key = [rng.choice(self.words) for _ in range(rng.randint(1, 3))]
            value = [rng.choice(self.digits) for _ in range(rng.randint(3, NUM_DIGITS))]
            size += 2 * (len(key) + len(value) + 2)
            if size > length:
                break
            pairs.append((key, value))
        ids, roles = [self.tokenizer.bos_token_id], [IGNORE]
        repeated = rng.sample(pairs, len(pairs))
        for role, group in ((IGNORE, pairs), (ANSWER, repeated)):
            for key, value in group:
                ids += [*key, self.space, *value, self.dot]
                roles += [IGNORE] * (len(key) + 1) + [role] * len(value) + [IGNORE]
        return ids, roles

    def document(
        self, length: int, num_numbers: int = 1, num_questions: int = 1, noise: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return a text of at most `length` tokens and the character span of every answer.

        An answer is the space and the digits after the question: the space has to be learnt like
        the digits, and among thousands of TEXT tokens it would weigh next to nothing.
        """
        rng = self.rng
        keys = rng.sample(KEYS, num_numbers)
        numbers = [str(rng.randrange(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS)) for _ in keys]
        needles = [NEEDLE.format(key=k, number=n) for k, n in zip(keys, numbers, strict=True)]
        asked = rng.sample(range(num_numbers), num_questions)
        tail = [f"{QUESTION.format(key=keys[i])} {numbers[i]}." for i in asked]
        room = length - 1 - self._size("\n".join([HEADER, " ".join(needles), *tail]))
        body: list[str] = []
        sentence, size = rng.choice(self.noise if noise else self.sentences)
        while size <= room:
            body.append(sentence)
            room -= size
            sentence, size = rng.choice(self.noise if noise else self.sentences)
        for needle in needles:
            body.insert(rng.randint(0, len(body)), needle)
        text, spans = f"{HEADER}\n{' '.join(body)}", []
        for line in tail:
            text += "\n" + line
            spans.append((len(text) - 2 - NUM_DIGITS, len(text) - 1))
        return text, spans

    def encode(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Tokenise a document; the tokens inside the spans get the role ANSWER."""
        encoding = self.tokenizer(text)
        roles = [IGNORE] + [TEXT] * (len(encoding.input_ids) - 1)
        for start, end in spans:
            for char in range(start, end):
                roles[encoding.char_to_token(char)] = ANSWER
        return encoding.input_ids, roles

    def sequence(self, kind: str, length: int) -> tuple[list[int], list[int]]:
        """Return ids and roles of one sequence of the given phase kind."""
        rng = self.rng
        if kind == "dense":
            return self.dense(length)
        noise = rng.random() < 0.5
        if kind == "many":
            length, count = rng.randint(length * 3 // 4, length), rng.randint(2, 5)
            count = min(count, 3) if length < 240 else count  # five numbers need about 240 tokens
            return self.encode(*self.document(length, count, min(2, count), noise))
        count = rng.randint(2, 3) if rng.random() < 0.15 else 1
        return self.encode(*self.document(length, count, 1, noise))

    def batch(self, kind: str, length: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and roles [size, longest sequence]; padding on the right has no role."""
        rows = [self.sequence(kind, length) for _ in range(size)]
        longest = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        ids = [ids + [pad] * (longest - len(ids)) for ids, _ in rows]
        roles = [roles + [IGNORE] * (longest - len(roles)) for _, roles in rows]
        return torch.tensor(ids), torch.tensor(roles)

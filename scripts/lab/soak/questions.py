"""What is asked of the server, and in which ways: all drawn from one seed.

A *question* is what decides on the tokens: prompt, options of this package, sampling. Each is asked
once alone, and then many times beside others, by *requests* that differ in what must not matter:
streamed or not, how many tokens, priority, a client that goes away.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lab.random_models import distinct_tokens

MAX_OUTPUT = 40
"""Tokens of the longest answers: two marks of the trigger `interval` lie in them."""
NUM_PREFIXES = 3
PREFIX_LEN = 160
"""Tokens that the longest prompts of one family have in common."""
MAX_PROMPT, MOST = 700, 400
"""Tokens of prompts; most are no longer than `MOST`: many small ones fill a pool to the last block,
and whoever grows then preempts. Presets compress from 512 tokens on."""
ROOM_FOR_CHAT = 120
"""Words of the longest chat."""
_WORDS = ("grass", "sky", "sun", "green", "blue", "yellow", "here", "there", "back", "again", "go")

KINDS = {
    "server": 20, "crowd": 2, "preset": 26, "budget": 14, "lossless": 20, "sampled": 4, "batch": 4,
    "shared_prefix": 6, "conversation": 4,
}  # fmt: skip
"""Kinds of questions, and how many of a hundred are of each. `crowd`: a prompt of three whole
blocks, uncompressed, that is asked by many at once; each grows into a fourth one at once."""
LOSSLESS = ("lossless", "crowd")
"""Those that nothing is evicted for."""
CROWD = range(20, 32)
"""Of a hundred requests those that are a crowd: more blocks than a small pool has."""
CROWD_PROMPT = 96

FATES = {"finish": 74, "disconnect": 12, "cancel": 8, "conversation": 3, "refused": 3}
"""What becomes of requests, in hundredths. `disconnect`: the client closes its stream after some
tokens. `cancel`: it closes the connection before there is an answer. `conversation`: two turns."""

REFUSED: tuple[dict[str, Any], ...] = (
    {"vllm_xargs": {"kv_compression": "zip"}},
    {"vllm_xargs": {"kv_budget_ratio": 2}},
    {"vllm_xargs": {"kv_budget_tokens": 0}},
    {"vllm_xargs": {"kv_pin": [0, 100000]}},
    {"vllm_xargs": {"kv_budget_token": 5}},
    {"vllm_xargs": {"kv_session": ""}},
    {"max_tokens": 100000},
)
"""Additions to a request that make it an HTTP 400."""


@dataclass(frozen=True)
class Question:
    """What decides on an answer's tokens.

    Attributes
    ----------
    name : str
        Unique.
    kind : str
        One of `KINDS`.
    prompt : list[int] or str or list[list[int]]
        Token ids; the text of a chat; or the prompts of one request with several.
    max_tokens : int
        Most that are ever asked for.
    xargs : dict
        ``vllm_xargs``.
    sampling : dict
        Further fields of the request.
    more : list[int]
        What a conversation's second turn has behind the first turn's prompt and answer.
    """

    name: str
    kind: str
    prompt: Any
    max_tokens: int
    xargs: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    more: list[int] = field(default_factory=list)

    @property
    def is_chat(self) -> bool:
        """Whether it goes to /v1/chat/completions."""
        return isinstance(self.prompt, str)

    def body(self, model: str, max_tokens: int | None = None) -> dict[str, Any]:
        """Fields of the HTTP request."""
        prompt = self.prompt
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.is_chat else None
        return {
            "model": model, **(asked or {"prompt": prompt}), "temperature": 0.0,
            "max_tokens": max_tokens or self.max_tokens, "ignore_eos": True,
            "return_token_ids": True, "vllm_xargs": dict(self.xargs), **self.sampling,
        }  # fmt: skip

    def stock(self) -> "Question":
        """The same for a server without compression."""
        return replace(self, xargs={})

    def second_turn(self, answer: Sequence[int]) -> "Question":
        """The next turn of a conversation."""
        return replace(
            self, name=f"{self.name}, turn 2", prompt=[*self.prompt, *answer, *self.more]
        )


@dataclass(frozen=True)
class Request:
    """One way to ask a question.

    Attributes
    ----------
    number : int
        Its place in the course of events.
    question : str
        Name of its question.
    fate : str
        One of `FATES`.
    stream, max_tokens, priority
        As in the HTTP request.
    leave_after : float
        `disconnect`: tokens that the client reads; `cancel`: seconds that it waits.
    stop_at : int or None
        The token of the expected answer that is given as a stop token.
    extra : dict
        Further fields.
    """

    number: int
    question: str
    fate: str = "finish"
    stream: bool = False
    max_tokens: int = MAX_OUTPUT
    priority: int = 0
    leave_after: float = 0
    stop_at: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self)


def weighted(rng: random.Random, weights: dict[str, int]) -> str:
    """A key, as often as its weight says."""
    return rng.choices(list(weights), list(weights.values()))[0]


class Questions:
    """Draws questions.

    Parameters
    ----------
    seed : int
        Of all draws.
    presets : sequence of str
        That requests to this server may name.
    max_output : int
        Tokens of the longest answers.
    """

    def __init__(self, seed: int, presets: Sequence[str], max_output: int = MAX_OUTPUT) -> None:
        self.rng, self.seed, self.presets = random.Random(f"questions {seed}"), seed, presets
        self.max_output = max_output
        self.prefixes = [
            distinct_tokens(MAX_PROMPT, seed=seed * 1000 + n) for n in range(NUM_PREFIXES)
        ]
        self.count = self.named = 0

    def draw(self, count: int, without: Sequence[str] = ()) -> list[Question]:
        """So many, the kinds in their shares, and every preset named at least once if it fits."""
        shares = {kind: share for kind, share in KINDS.items() if kind not in without}
        whole = sum(shares.values())
        kinds = [kind for kind, share in shares.items() for _ in range(-(-share * count // whole))]
        self.rng.shuffle(kinds)
        # One of each kind first: a few questions are of as many kinds as there can be.
        firsts = list(dict.fromkeys(kinds))
        for kind in firsts:
            kinds.remove(kind)
        return [self._question(kind) for kind in (firsts + kinds)[:count]]

    def _question(self, kind: str) -> Question:
        rng, self.count = self.rng, self.count + 1
        xargs: dict[str, Any]
        name = f"{kind} {self.count}"
        most = self.max_output
        output = rng.choice([most, most, 2 * most // 3, most // 2])
        if kind == "server" and rng.random() < 0.4:
            words = [rng.choice(_WORDS) for _ in range(rng.randint(8, ROOM_FOR_CHAT))]
            return Question(name, kind, f"{name}: {' '.join(words)}.", output)
        if kind == "crowd":
            xargs = {"kv_compression": "none"}
            return Question(name, kind, self._tokens(CROWD_PROMPT), self.max_output, xargs)
        if kind == "preset":
            self.named += 1
            xargs = {"kv_compression": self.presets[self.named % len(self.presets)]}
            if rng.random() < 0.5:
                xargs |= {"kv_budget_tokens": rng.choice([64, 128, 256])}
            return Question(name, kind, self._prompt(520, 620), output, xargs)
        if kind == "budget":
            prompt = self._prompt(130)
            return Question(name, kind, prompt, output, self._budget(len(prompt)))
        if kind == "lossless":
            xargs = rng.choice([{"kv_compression": "none"}, {"kv_budget_tokens": 4096}])
            return Question(name, kind, self._prompt(), most, dict(xargs))
        if kind == "sampled":
            # On a CPU a drawn token costs as much as ten greedy ones.
            sampling = {"temperature": 1.0, "seed": rng.randrange(2**31), "n": rng.randint(1, 3)}
            return Question(name, kind, self._prompt(130), 8, sampling=sampling)
        if kind == "batch":
            return Question(name, kind, [self._prompt(130, 200) for _ in range(2)], 16)
        if kind == "shared_prefix":
            shared = 32 * rng.randint(17, 19)
            text = rng.choice(self.prefixes)[:shared]
            prompt = [*text, *self._tokens(rng.randint(20, 60), text)]
            xargs = {"kv_compression": "shared_prefix", "kv_shared_prefix": shared}
            return Question(name, kind, prompt, 16, xargs)
        if kind == "conversation":
            prompt = self._prompt(200, 350)
            more = self._tokens(rng.randint(40, 90), prompt)
            return Question(name, kind, prompt, 16, more=more)
        return Question(name, kind, self._prompt(), output)

    def _tokens(self, length: int, behind: Sequence[int] = ()) -> list[int]:
        """Tokens that `behind` has not: where one comes twice, the order of scores is numerics."""
        seed, known = self.rng.randrange(10**6, 10**9), set(behind)
        drawn = distinct_tokens(length + len(known), seed=seed)
        return [token for token in drawn if token not in known][:length]

    def _prompt(self, least: int = 8, most: int = MOST) -> list[int]:
        """Fresh, or with another's beginning; of any length, whole blocks among them."""
        rng = self.rng
        length = rng.randint(least, most)
        if rng.random() < 0.3:
            length = max(least, length // 32 * 32 + rng.choice([0, 1]))
        shared: list[int] = []
        if rng.random() < 0.5:
            common = rng.choice([length - 1, rng.randint(1, PREFIX_LEN), PREFIX_LEN])
            shared = rng.choice(self.prefixes)[: min(common, length)]
        return [*shared, *self._tokens(length - len(shared), shared)]

    def _budget(self, prompt_len: int) -> dict[str, Any]:
        rng = self.rng
        xargs: dict[str, Any] = {}
        if rng.random() < 0.5:
            xargs["kv_budget_ratio"] = rng.choice([0.05, 0.12, 0.5, 0.9])
        else:
            xargs["kv_budget_tokens"] = rng.choice([1, 64, 200])
        if rng.random() < 0.5:
            start = rng.randrange(prompt_len - 1)
            xargs["kv_pin"] = [start, min(start + rng.choice([1, 40]), prompt_len)]
        return xargs


def draw_requests(seed: int, questions: Sequence[Question], count: int) -> list[Request]:
    """The requests of a run, every kind of question as often as it should be."""
    rng = random.Random(f"requests {seed}")
    of_kind: dict[str, list[Question]] = {}
    for question in questions:
        of_kind.setdefault(question.kind, []).append(question)
    shares = {kind: share for kind, share in KINDS.items() if kind in of_kind}
    fates = FATES if "conversation" in of_kind else FATES | {"conversation": 0}
    return [_request(rng, number, of_kind, shares, fates) for number in range(1, count + 1)]


def _request(
    rng: random.Random,
    number: int,
    of_kind: dict[str, list[Question]],
    shares: dict[str, int],
    fates: dict[str, int],
) -> Request:
    if number % 100 in CROWD and "crowd" in of_kind:
        question = rng.choice(of_kind["crowd"])
        # Of another salt: they share no blocks.
        extra: dict[str, Any] = {"cache_salt": str(number)}
        stream = rng.random() < 0.5
        return Request(number, question.name, "finish", stream, question.max_tokens, extra=extra)
    fate = weighted(rng, fates)
    kind = "conversation" if fate == "conversation" else weighted(rng, shares)
    question = rng.choice(of_kind[kind])
    most = question.max_tokens
    stream = rng.random() < 0.5
    few = min(most, 8)
    lengths = [most, rng.randint(1, most), *(rng.randint(1, few) for _ in range(3))]
    max_tokens = most if kind == "lossless" else rng.choice(lengths)
    leave_after, stop_at = 0.0, None
    extra = {}
    if fate == "disconnect":
        stream, max_tokens, leave_after = True, most, rng.randint(1, most - 1)
    elif fate == "cancel":
        stream, max_tokens, leave_after = False, most, rng.uniform(0.02, 3)
    elif fate == "refused":
        extra = dict(rng.choice(REFUSED))
    elif fate == "conversation":
        max_tokens = most
    elif rng.random() < 0.1:
        stop_at = rng.randrange(most)
    elif not question.is_chat and rng.random() < 0.05:
        extra = {"logprobs": 2}
    priority = rng.choice([0, 0, 0, 1, 5, -1])
    return Request(
        number, question.name, fate, stream, max_tokens, priority, leave_after, stop_at, extra
    )

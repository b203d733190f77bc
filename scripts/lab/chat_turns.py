"""Prefill tokens of every turn of a chat: stock vLLM, compression, and compression with sessions.

    python scripts/chat_turns.py               four chats of ten turns, in a tight pool
    python scripts/chat_turns.py --pool ample  the same where everything fits
    python scripts/chat_turns.py --ask last    the number is asked for in the last turn alone

Each chat begins with a text that hides a number, and every later turn adds some sentences. Chats
take turns, so that the others' blocks come between two turns of one. Counted are the prompt tokens
that the engine really computed, summed over all chats; nothing is estimated, and the counts are the
same on every machine. Runs on a CPU in float32 with the probe model. Exits with 1 unless sessions
compute the fewest.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lab.places import PROBE_MODEL
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.tasks.needle import NeedleSample, is_right, make_samples

MODEL = str(PROBE_MODEL)
DIGITS, BLOCK = 7, 32
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
POOLS = {"ample": 32_000, "tight": 4_000}
"""Token slots for all chats; a chat ends with about 2,000 tokens."""


@dataclass
class Turns:
    """What a variant did, summed over chats.

    Attributes
    ----------
    computed, prompts : list[int]
        Prompt tokens computed, and prompt tokens that there were, by turn.
    right : list[int]
        Chats that were answered right, by turn; of turns that ask.
    answers : list[list[int]]
        Tokens of every answer, in order.
    counts : dict
        What the metrics counted of conversations.
    """

    computed: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)


class CountedEngine(Engine):
    """An engine that counts the prompt tokens its steps compute."""

    num_prefilled = 0

    def step(self) -> None:
        """Run one engine step."""
        scheduler = self.scheduler
        schedule = scheduler.schedule

        def counted(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            for name, count in output.num_scheduled_tokens.items():
                request = scheduler.requests[name]
                end, prompt = request.num_computed_tokens, request.num_prompt_tokens
                self.num_prefilled += min(end, prompt) - min(end - count, prompt)
            return output

        scheduler.schedule = counted
        try:
            super().step()
        finally:
            del scheduler.schedule


def question_of(sample: NeedleSample) -> str:
    """The last line of a prompt."""
    return sample.prompt.rsplit("\n", 1)[1]


def user_turn(sample: NeedleSample, turn: int, num_turns: int, ask: str) -> str:
    """What the user says in a turn, the text in the first."""
    text = sample.prompt.rsplit("\n", 1)[0] if turn == 0 else f". {FILLER} {FILLER}"
    if ask == "always" or turn == num_turns - 1:
        return f"{text}\n{question_of(sample)}"
    return f"{text}\nIn short, the grass is"


def talk(
    engine: CountedEngine,
    samples: Sequence[NeedleSample],
    num_turns: int,
    ask: str,
    xargs: Sequence[dict[str, Any] | None],
) -> Turns:
    """All chats, turn by turn, one request at a time."""
    found, chats = Turns(), [list[int]() for _ in samples]
    for turn in range(num_turns):
        before, right, length = engine.num_prefilled, 0, 0
        for number, sample in enumerate(samples):
            said = engine.tokenize(user_turn(sample, turn, num_turns, ask))
            chats[number] += said if turn == 0 else said[1:]  # one token in front of the text
            length += len(chats[number])
            (answer,) = engine.generate([chats[number]], DIGITS + 1, xargs[number], ignore_eos=True)
            chats[number] += answer
            found.answers.append(answer)
            right += is_right(engine.decode(answer), sample.answer)
        found.computed.append(engine.num_prefilled - before)
        found.prompts.append(length)
        found.right.append(right)
    return found


def variants(args: argparse.Namespace) -> dict[str, tuple[Any, bool]]:
    """Settings by name, and whether chats name a session."""
    setting = {"preset": args.preset, "budget": {"ratio": args.ratio}}
    return {"stock": (None, False), "today": (setting, False), "reuse": (setting, True)}


def measure(args: argparse.Namespace, name: str, setting: Any, is_session: bool) -> Turns:
    """One variant on an engine of its own."""
    blocks = 1 + POOLS[args.pool] // BLOCK
    engine = CountedEngine(MODEL, setting, num_blocks=blocks, max_model_len=3072)
    samples = make_samples(args.num_chats, args.num_tokens, engine.tokenize, seed=5)
    xargs = [{"kv_session": f"chat-{n}"} if is_session else None for n in range(args.num_chats)]
    found = talk(engine, samples, args.num_turns, args.ask, xargs)
    if is_session:
        stats = engine.scheduler.stats
        found.counts = {"requests": dict(stats.session_requests), "tokens": stats.session_tokens}
        found.counts["given back"] = dict(stats.sessions_given_back)
    engine.close()
    return found


def main() -> int:
    """Run every variant and print a row per turn."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pool", choices=POOLS, default="tight")
    parser.add_argument("--ask", choices=("always", "last"), default="always")
    parser.add_argument("--preset", default="auto")
    parser.add_argument("--ratio", type=float, default=0.12)
    parser.add_argument("--num-chats", type=int, default=4)
    parser.add_argument("--num-turns", type=int, default=10)
    parser.add_argument("--num-tokens", type=int, default=1200, help="of a chat's first prompt")
    parser.add_argument("--only", nargs="+", default=["stock", "today", "reuse"])
    args = parser.parse_args()
    found = {
        name: measure(args, name, *variant)
        for name, variant in variants(args).items()
        if name in args.only
    }
    print(
        f"{args.num_chats} chats, {args.preset} at {args.ratio:g}, pool {args.pool} "
        f"({POOLS[args.pool]:,} token slots), asked {args.ask}"
    )
    print(f"{'turn':>4} {'prompt':>8} " + " ".join(f"{n:>8} {'right':>6}" for n in found))
    for turn in range(args.num_turns):
        cells = [f"{each.computed[turn]:8} {each.right[turn]:6}" for each in found.values()]
        longest = max(each.prompts[turn] for each in found.values())
        print(f"{turn + 1:4} {longest:8} " + " ".join(cells))
    if "stock" in found:
        for name, each in found.items():
            pairs = zip(found["stock"].answers, each.answers, strict=True)
            equal = sum(a == b for x, y in pairs for a, b in zip(x, y, strict=True))
            print(f"{name}: {equal} of {sum(map(len, each.answers))} tokens equal to stock's")
    sums = [f"{sum(each.computed):8} {sum(each.right):6}" for each in found.values()]
    print(f"{'all':>4} {'':8} " + " ".join(sums))
    for name, each in found.items():
        if each.counts:
            print(f"{name}: {each.counts}")
    totals = {name: sum(each.computed) for name, each in found.items()}
    return 0 if totals.get("reuse", 0) <= min(totals.values()) else 1

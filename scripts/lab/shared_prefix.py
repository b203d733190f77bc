"""Many questions over some texts: every prompt for itself, or each text compressed once for all.

    python scripts/shared_prefix.py                     six texts with four questions each
    python scripts/shared_prefix.py --pool 9000         in a pool of so many token slots
    python scripts/shared_prefix.py --ratios 0.12 0.5   what is kept

Each text hides four codes, and each question asks for one of them. All questions arrive at once,
texts taking turns, so that those of one text come apart. Counted are engine steps, the prompt
tokens that were really computed, the most blocks in use at the end of a step (what is kept for
others among them), preemptions, and right answers; the counts are the same on every machine. Runs
on a CPU in float32 with SmolLM2-135M. Exits with 1 if, where everything fits, sharing held as many
blocks as stock vLLM.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from lab import smollm2
from lab.chat_turns import CountedEngine
from vllm_kvcompress.evaluation.quality.generated import generated_sample
from vllm_kvcompress.evaluation.quality.intervals import wilson
from vllm_kvcompress.evaluation.quality.prompts import Prompter

BLOCK, NUM_ANSWER_TOKENS = 32, 12
STOCK = "stock vLLM"


@dataclass(frozen=True)
class Question:
    """One prompt.

    Attributes
    ----------
    token_ids : list[int]
        All of it.
    shared : int
        Tokens that the other questions about the same text begin with, too.
    answer : str
        The code that is asked for.
    """

    token_ids: list[int]
    shared: int
    answer: str


def questions_about(text: int, num_tokens: int, seed: int, prompter: Prompter) -> list[Question]:
    """Four questions about one text; the same arguments give the same ones."""
    sample = generated_sample(
        "ruler_multikey", num_tokens, text, 5, seed, prompter.words, prompter.count, prompter.tokens
    )
    hidden = re.findall(r"The secret code of (.+?) is (\d+)\.", sample.context)
    (asked,) = (key for key, code in hidden if code == sample.answers[0])
    found = []
    for key, code in hidden:
        ask = f" of {asked}", f" of {key}"
        prompt = prompter.encode(
            sample.context, sample.question.replace(*ask), sample.answer_prefix.replace(*ask)
        )
        found.append(Question(prompt.token_ids, len(prompt.context), code))
    return found


@dataclass
class Found:
    """What a variant did."""

    steps: int
    computed: int
    peak: int
    preemptions: int
    right: int
    counts: dict[str, int]


def measure(
    args: argparse.Namespace, setting: Any, texts: Sequence[Sequence[Question]], is_shared: bool
) -> Found:
    """One variant on an engine of its own, which is given all questions at once."""
    num_blocks = None if args.pool is None else 1 + args.pool // BLOCK
    engine = CountedEngine(
        str(args.model),
        setting,
        num_blocks,
        max_model_len=args.num_tokens + BLOCK,
        kv_cache_memory_bytes=6 << 30,
    )
    asked = {f"{number}-{text}": question for text, questions in enumerate(texts)
             for number, question in enumerate(questions)}  # fmt: skip
    for name in sorted(asked):
        xargs = {"kv_shared_prefix": asked[name].shared} if is_shared else None
        engine.add(name, asked[name].token_ids, NUM_ANSWER_TOKENS, xargs)
    peak = 0
    while engine.live():
        engine.step()
        peak = max(peak, engine.num_usable_blocks - engine.pool.get_num_free_blocks())
    right = sum(
        asked[name].answer in engine.decode(engine.results[name].token_ids) for name in asked
    )
    counts = {}
    if setting is not None:
        stats = engine.scheduler.stats
        counts = dict(stats.shared_prefix_requests)
        counts |= {f"given back: {key}": n for key, n in stats.shared_prefixes_given_back.items()}
    found = Found(
        engine.num_steps, engine.num_prefilled, peak, engine.num_preemptions, right, counts
    )
    engine.close()
    return found


def variants(args: argparse.Namespace) -> dict[str, tuple[Any, bool]]:
    """Settings by name, and whether requests say what they share."""
    found: dict[str, tuple[Any, bool]] = {STOCK: (None, False)}
    for ratio in args.ratios:
        budget = {"budget": {"ratio": ratio}}
        found[f"auto, {ratio:.0%}, each prompt"] = ({"preset": "auto", **budget}, False)
        for preset in args.presets:
            found[f"{preset}, {ratio:.0%}, shared"] = ({"preset": preset, **budget}, True)
    return {name: each for name, each in found.items() if each[1] or not args.shared_only}


def main() -> int:
    """Run every variant and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="a folder; SmolLM2 where it is not given")
    parser.add_argument("--num-texts", type=int, default=6)
    parser.add_argument("--num-tokens", type=int, default=1500, help="of a prompt")
    parser.add_argument("--pool", type=int, help="token slots; else everything fits")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25])
    parser.add_argument("--presets", nargs="+", default=["shared_prefix"], help="of what is shared")
    parser.add_argument("--shared-only", action="store_true", help="neither stock nor auto")
    parser.add_argument("--seed", type=int, default=4000)
    args = parser.parse_args()
    args.model = args.model or smollm2.fetch()
    prompter = Prompter(AutoTokenizer.from_pretrained(args.model))
    texts = [
        questions_about(n, args.num_tokens, args.seed, prompter) for n in range(args.num_texts)
    ]
    total = sum(map(len, texts))
    pool = "ample" if args.pool is None else f"{args.pool:,} token slots"
    table = Table(
        "", "steps", "prompt tokens computed", "most blocks", "preempted", "right", "95 %"
    )
    peaks = {}
    for name, variant in variants(args).items():
        found = measure(args, variant[0], texts, variant[1])
        bounds = wilson(found.right, total)
        share = f"{bounds.low:.0%} to {bounds.high:.0%}"
        row = found.steps, f"{found.computed:,}", found.peak, found.preemptions, found.right, share
        table.add_row(name, *map(str, row))
        peaks[name] = found.peak
        if found.counts and variant[1]:
            print(f"{name}: {found.counts}")
    Console(width=120).print(
        f"{total} questions about {args.num_texts} texts, {args.num_tokens} tokens, pool {pool}",
        table,
    )
    shared = [peak for name, peak in peaks.items() if name.endswith("shared")]
    if args.pool is not None or STOCK not in peaks:
        return 0
    return 0 if max(shared) < peaks[STOCK] else 1

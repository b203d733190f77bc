"""Prompts to try `kvcompress tune` on, as JSONL: needles of three kinds, and texts to go on with.

    python scripts/lab/tune_prompts.py --model DIR --count 200 --out prompts.jsonl

Half of them ask for a code (alone, among three others, or for all four of one key, in turns), half
end inside a text: this repository's documents, cut to the length. No prompt is one of docs/reports:
the seed is another one.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

from vllm_kvcompress.evaluation.quality.plan import TaskOptions, make_plan
from vllm_kvcompress.evaluation.quality.prompts import Prompter

ROOT = Path(__file__).resolve().parents[2]
NEEDLES = ["niah", "ruler_multikey", "ruler_multivalue"]


def needles(prompter: Prompter, count: int, length: int, seed: int) -> Iterator[dict[str, object]]:
    """The families in turns."""
    options = TaskOptions((length,), -(-count // len(NEEDLES)), 5, 0, seed)
    for planned in make_plan(NEEDLES, options, prompter)[:count]:
        sample = planned.make()
        yield {
            "context": sample.context, "question": sample.question,
            "answer_prefix": sample.answer_prefix, "answers": list(sample.answers),
        }  # fmt: skip


def texts(prompter: Prompter, count: int, length: int, seed: int) -> Iterator[dict[str, object]]:
    """Runs of words from the documents, each from another place."""
    rng = random.Random(seed)
    files = sorted((ROOT / "docs").glob("*.md"))
    words = " ".join(path.read_text(encoding="utf-8") for path in files).split()
    for _ in range(count):
        start = rng.randrange(len(words) - length)
        ids = prompter.continuation(" ".join(words[start : start + length]))[: length - 60]
        yield {"context": prompter.text(ids), "question": "\n\nGo on with this text."}


def main() -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--length", type=int, default=1000, help="tokens of a prompt")
    parser.add_argument("--seed", type=int, default=3000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    prompter = Prompter(AutoTokenizer.from_pretrained(args.model))
    half = args.count // 2
    given = args.length, args.seed
    rows = [*needles(prompter, args.count - half, *given), *texts(prompter, half, *given)]
    random.Random(args.seed).shuffle(rows)
    with args.out.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

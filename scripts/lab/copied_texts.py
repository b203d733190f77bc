"""Texts that are said twice, as JSONL for `kvcompress eval --tasks text:FILE`.

    python scripts/lab/copied_texts.py --model DIR --text FILE --count 12 --out copies.jsonl

A passage of `--tokens` tokens, one line that announces it once more, and the passage again. With
`--lengths` a few tokens above `--tokens` and a `--continuation` a few below it, what is predicted
is the second half: a cache that lost the passage cannot.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from transformers import AutoTokenizer

ANNOUNCED = "\n\nThe same text once more:\n\n"


def main() -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, metavar="DIR", help="for its tokenizer")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=500, metavar="N", help="of a passage")
    parser.add_argument("--count", type=int, default=12, metavar="N")
    parser.add_argument("--seed", type=int, default=7, metavar="N")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.text.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= args.tokens:
        parser.error(f"--text: {args.text} holds {len(ids)} tokens, --tokens are {args.tokens}")
    rng = random.Random(args.seed)
    with args.out.open("w", encoding="utf-8") as file:
        for _ in range(args.count):
            start = rng.randrange(len(ids) - args.tokens)
            passage = tokenizer.decode(ids[start : start + args.tokens])
            file.write(json.dumps({"text": passage + ANNOUNCED + passage}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

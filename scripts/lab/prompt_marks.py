"""What compression inside prompts costs in right answers, against compression at their end.

    python scripts/prompt_marks.py run --out answers.csv
    python scripts/prompt_marks.py run --out answers.csv --model DIR --dtype bfloat16 --lengths 6000
    python scripts/prompt_marks.py show --out answers.csv

One number is hidden in a long text, at evenly spread depths; the question stands behind the text.
`run` appends a row per answer, and leaves out what the file has already. Prompts are computed and
decoded by Hugging Face transformers, compacted in between by the worker's own code
(`vllm_kvcompress.evaluation.replay`, held against the engine by tests/e2e/test_prompt_marks.py).
The probe model gets the needles it was trained on; any other model those of `kvcompress eval`, in
its chat template. `show` prints a table per model, length and budget: right answers, and their
95 % interval (Wilson).
"""

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoTokenizer

from lab.places import PROBE_MODEL
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.evaluation.inspection import load_replay
from vllm_kvcompress.evaluation.provenance import versions
from vllm_kvcompress.evaluation.quality.intervals import wilson
from vllm_kvcompress.evaluation.quality.plan import TaskOptions, make_plan
from vllm_kvcompress.evaluation.quality.prompts import Prompter
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.evaluation.tasks.needle import make_samples
from vllm_kvcompress.lengths.peak import peak_tokens

POLICIES = ("snapkv", "windowkv", "adakv", "keydiff")
COLUMNS = (
    "model",
    "prompt_tokens",
    "policy",
    "ratio",
    "interval",
    "seed",
    "sample",
    "depth",
    "right",
)
WHOLE, END = "none", "end"
BLOCK_SIZE = 32
NUM_ANSWER_TOKENS = 12
GOLDEN = 0.618
"""Sorted by the fractions of its multiples, neighbours come far from each other."""

Place = tuple[str, ...]
"""The first seven columns, as they are written."""


@dataclass(frozen=True)
class Question:
    """One prompt: its tokens, the number that the answer must hold, and how deep it is hidden."""

    token_ids: list[int]
    answer: str
    depth: float


@dataclass(frozen=True)
class Setting:
    """One policy at one budget, at the end of the prompt or every so many of its tokens."""

    policy: str
    ratio: float
    interval: str

    @property
    def config(self) -> CompressionConfig | None:
        """As a request has it whose task is known; None keeps everything."""
        if self.policy == WHOLE:
            return None
        marks: dict[str, Any] = {"trigger": "end_of_prompt"}
        if self.interval != END:
            marks = {"trigger": "prompt", "prompt_interval": int(self.interval)}
        config = parse_config({"preset": self.policy, "budget": {"ratio": self.ratio}, **marks})
        assert config is not None
        return config.by_task.get("localization", config)


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """All that is compared; the whole cache first."""
    intervals = [END, *map(str, args.intervals)]
    found = [Setting(WHOLE, 1.0, END)]
    for policy in args.policies:
        found += [Setting(policy, ratio, each) for ratio in args.ratios for each in intervals]
    return found


def questions_of(args: argparse.Namespace, tokenizer: Any, length: int) -> list[Question]:
    """Prompts of one length; the same arguments give the same ones."""
    if args.model == PROBE_MODEL:
        samples = make_samples(args.num_samples, length, tokenizer.encode, seed=args.seed)
        return [Question(tokenizer.encode(s.prompt), s.answer, s.depth) for s in samples]
    prompter, depths = Prompter(tokenizer), args.num_samples
    options = TaskOptions((length,), args.num_samples, depths, 1, args.seed)
    made = [planned.make() for planned in make_plan(["niah_single"], options, prompter)]
    return [Question(prompter.of(s).token_ids, s.answers[0], s.depth or 0.0) for s in made]


# --- rows ---------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, str]]:
    """Rows measured so far."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def append(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Add rows; the first line of a new file says what it was measured with."""
    is_new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            file.write("# " + json.dumps(versions()) + "\n")
            writer.writerow(COLUMNS)
        writer.writerows(rows)


def measure(args: argparse.Namespace) -> None:
    """All answers that are not in the file."""
    torch.set_num_threads(args.threads)
    replay = load_replay(args.model, BLOCK_SIZE, getattr(torch, args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    done = {tuple(row.values())[:7] for row in read(args.out)}
    for length in args.lengths:
        questions = questions_of(args, tokenizer, length)
        title = f"{args.model.name}, {length} tokens"
        # Depths in turns, so that a run that is cut short has seen all of the text.
        order = sorted(range(len(questions)), key=lambda number: number * GOLDEN % 1)
        for number in track(order, title, console=Console(stderr=True)):
            question = questions[number]
            where = args.model.name, str(length)
            places: dict[Setting, Place] = {
                each: (
                    *where,
                    each.policy,
                    str(each.ratio),
                    each.interval,
                    str(args.seed),
                    str(number),
                )
                for each in settings_of(args)
            }
            todo = [each for each, place in places.items() if place not in done]
            if todo:
                answers = zip(todo, _answers(replay, tokenizer, question, todo), strict=True)
                depth = f"{question.depth:.4f}"
                append(args.out, [[*places[each], depth, int(right)] for each, right in answers])


def _answers(
    replay: Replay, tokenizer: Any, question: Question, settings: Sequence[Setting]
) -> Iterator[bool]:
    """Whether each setting's answer is right."""
    prompt = replay.prefill(question.token_ids)
    for each in settings:
        tokens = replay.generate(prompt, each.config, NUM_ANSWER_TOKENS)
        yield question.answer in "".join(tokenizer.decode(tokens).split())


# --- tables -------------------------------------------------------------------------------


def show(args: argparse.Namespace) -> None:
    """One table per model, length and budget; policies are rows, intervals columns."""
    rows = read(args.out)
    for model, length, ratio in dict.fromkeys(
        (row["model"], row["prompt_tokens"], row["ratio"]) for row in rows if row["policy"] != WHOLE
    ):
        mine = [
            row
            for row in rows
            if (row["model"], row["prompt_tokens"]) == (model, length)
            and row["ratio"] in (ratio, "1.0")
        ]
        intervals = [each for each in dict.fromkeys(row["interval"] for row in mine) if each != END]
        intervals = [END, *sorted(intervals, key=int, reverse=True)]
        whole = [row for row in mine if row["policy"] == WHOLE]
        seeds = ", ".join(dict.fromkeys(row["seed"] for row in mine))
        print(f"\n{model}, {length} tokens, {float(ratio):.0%} kept, seeds {seeds}: ", end="")
        print(f"whole cache {cell_text(whole)}\n")
        heads = ["at the end", *(f"every {int(each):,}" for each in intervals[1:])]
        print("| policy | " + " | ".join(heads) + " |")
        print("|---|" + "---|" * len(heads))
        policies = [p for p in dict.fromkeys(row["policy"] for row in mine) if p != WHOLE]
        for policy in policies:
            cells = [
                cell_text([r for r in mine if (r["policy"], r["interval"]) == (policy, each)])
                for each in intervals
            ]
            print(f"| `{policy}` | " + " | ".join(cells) + " |")
        if policies:
            most = [peak(Setting(policies[0], float(ratio), e), int(length)) for e in intervals]
            print("| most tokens held | " + " | ".join(f"{each:,}" for each in most) + " |")


def peak(setting: Setting, length: int) -> int:
    """Most slots of a layer that the prompt needs at once."""
    assert setting.config is not None
    return peak_tokens(length, length, setting.config, 1, BLOCK_SIZE)[0]


def cell_text(rows: Sequence[dict[str, str]]) -> str:
    """ "33 of 40 (68-91)": right answers, and the interval of their share in percent."""
    if not rows:
        return ""
    right, total = sum(int(row["right"]) for row in rows), len(rows)
    share = wilson(right, total)
    return f"{right} of {total} ({100 * share.low:.0f}-{100 * share.high:.0f})"


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("command", choices=["run", "show"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=PROBE_MODEL)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 4000])
    parser.add_argument("--intervals", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.12])
    parser.add_argument("--policies", nargs="*", default=list(POLICIES))
    parser.add_argument("--num-samples", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    {"run": measure, "show": show}[args.command](args)
    return 0

"""Mean accepted length of drafts over a compressed view, by policy, budget and task.

    python scripts/acceptance_curve.py --out FOLDER
    python scripts/acceptance_curve.py --out FOLDER --policies snapkv --budgets 0.12 --prompts 10
    python scripts/acceptance_curve.py --out FOLDER --model DIR --texts docs/*.md --prompts 20

Writes acceptance.csv, acceptance.png and run.json into a new folder. Prompts are prefilled and
continued by Hugging Face transformers on CPU in float32, views are taken by the worker's own code,
and draft-then-verify is replayed over them (`lab.speculation.acceptance`, held against
the engine by tests/lab/test_acceptance.py). One thread: with few cores, threads wait for
each other longer than they compute. With --model, prompts are needles of `kvcompress eval`, pieces
of the texts to go on with, and pieces to summarize, in the model's chat template.
"""

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from lab.places import PROBE_MODEL, ROOT
from lab.random_models import MODELS as RANDOM_MODELS
from lab.random_models import distinct_tokens, write_random_model
from lab.speculation.acceptance import (
    Acceptance,
    Walk,
    continue_exactly,
    plain_text,
    summarize,
    walk,
)
from vllm_kvcompress.config.reading import parse_config, preset_names
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core.classifier import TaskClassifier, head_and_tail
from vllm_kvcompress.evaluation.provenance import provenance, public_words
from vllm_kvcompress.evaluation.quality.plan import TaskOptions, make_plan
from vllm_kvcompress.evaluation.quality.prompts import Prompter
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.evaluation.seeds import prompt_seed
from vllm_kvcompress.evaluation.tasks.needle import is_right, make_samples
from vllm_kvcompress.request_options import choose_task, parse_request, resolve_request

POLICIES = ["windowkv", "snapkv", "keydiff", "streaming_llm", "h2o", "random"]
BUDGETS = [0.03, 0.06, 0.12, 0.25, 0.5]
PROBE = "probe"
RETRIEVAL, TEXT, TOKENS = "retrieval", "plain text", "random tokens"
NEEDLE, SUMMARY = "needle", "summary"
# A real model's answer to a needle is the code and a full stop.
NUM_TOKENS = {RETRIEVAL: 32, TEXT: 64, TOKENS: 64, NEEDLE: 8, SUMMARY: 64}
RANDOM_PROMPT_LEN = 1500  # no token twice, of a vocabulary of 1,536
ALL, ENGLISH = "all", "english"
CSV_NAME, PLOT_NAME, RUN_NAME = "acceptance.csv", "acceptance.png", "run.json"


@dataclass(frozen=True)
class Prompt:
    """One prompt: its tokens, its task, the style of its filler, and the needle's number."""

    token_ids: list[int]
    task: str
    style: str
    answer: str = ""


Key = tuple[str, str, str, str, float]
"""model, task, style, policy, budget"""


class Curve:
    """Walks of all cells, and what the whole cache answered."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.walks: dict[Key, list[Walk]] = {}
        self.right: dict[str, list[bool]] = {}
        self.classifier = TaskClassifier.load()

    def measure(self, name: str, folder: str, prompts: list[Prompt], decode: Any) -> None:
        """Walk all prompts of one model under every policy and budget."""
        replay = Replay(folder)
        for prompt in track(prompts, name, console=Console(stderr=True)):
            num_tokens = NUM_TOKENS[prompt.task]
            prefilled = replay.prefill(prompt.token_ids)
            exact = continue_exactly(replay, prefilled, num_tokens + self.args.draft_tokens - 1)
            if prompt.answer:
                found = is_right(decode(exact.tokens), prompt.answer)
                self.right.setdefault(prompt.style, []).append(found)
            seed = prompt_seed(prompt.token_ids)
            for policy in self.args.policies:
                for budget in self.args.budgets:
                    config = self.setting(policy, budget, prompt, decode)
                    found = walk(replay, prefilled, exact, config, num_tokens, seed)
                    for style in dict.fromkeys((ALL, prompt.style)):
                        key = (name, prompt.task, style, policy, budget)
                        self.walks.setdefault(key, []).append(found)

    def setting(self, policy: str, budget: float, prompt: Prompt, decode: Any) -> CompressionConfig:
        """A preset in draft mode, its task classified if it asks, without the preset's floor.

        The floors are 64 or 128 tokens: under them 3 % and 6 % of these prompts would be the same.
        """
        fields = {
            "preset": policy,
            "mode": "draft",
            "draft": {"tokens": self.args.draft_tokens},
            "budget": {"ratio": budget, "floor": 1},
        }
        server, options = parse_config(fields), parse_request(None)
        assert server is not None
        task, _ = choose_task(server, options, lambda: self.classify(prompt, decode))
        config = resolve_request(server, options, task)
        assert config is not None
        return config

    def classify(self, prompt: Prompt, decode: Any) -> str | None:
        """Localization or aggregation; None without a tokenizer."""
        if decode is None:
            return None
        return self.classifier.classify(*map(decode, head_and_tail(prompt.token_ids)))

    def cells(self) -> dict[Key, Acceptance]:
        """All walks, summarized; one table behind the other."""
        tables = list(dict.fromkeys(key[:3] for key in self.walks))
        keys = sorted(self.walks, key=lambda key: tables.index(key[:3]))
        return {key: summarize(self.walks[key], self.args.draft_tokens) for key in keys}


def probe_prompts(args: argparse.Namespace, tokenize: Callable[[str], list[int]]) -> list[Prompt]:
    """Needle prompts, and their filler as plain text."""
    samples = make_samples(args.prompts, args.prompt_tokens, tokenize, seed=args.seed)
    needles = [Prompt(tokenize(s.prompt), RETRIEVAL, s.style, s.answer) for s in samples]
    return needles + [Prompt(tokenize(plain_text(s)), TEXT, s.style) for s in samples]


def real_prompts(args: argparse.Namespace, prompter: Prompter) -> list[Prompt]:
    """Needles, and pieces of texts to go on with and to summarize."""
    options = TaskOptions((args.prompt_tokens,), args.prompts, 5, NUM_TOKENS[TEXT], args.seed)
    needles = [planned.make() for planned in make_plan(["niah"], options, prompter)]
    found = [Prompt(prompter.of(s).token_ids, NEEDLE, ALL, s.answers[0]) for s in needles]
    texts = "text:" + ":".join(map(str, args.texts))
    for planned in make_plan([texts], options, prompter):
        context = planned.make().context
        found.append(Prompt(prompter.continuation(context), TEXT, ALL))
        asked = prompter.encode(context, "\n\nSummarize this text in a few sentences.", "")
        found.append(Prompt(asked.token_ids, SUMMARY, ALL))
    return found


def measure(args: argparse.Namespace) -> Curve:
    """All models."""
    curve = Curve(args)
    if args.model is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        prompts = real_prompts(args, Prompter(tokenizer))
        curve.measure(args.model.name, str(args.model), prompts, tokenizer.decode)
        return curve
    tokenizer = AutoTokenizer.from_pretrained(str(PROBE_MODEL))
    curve.measure(PROBE, str(PROBE_MODEL), probe_prompts(args, tokenizer.encode), tokenizer.decode)
    for model in args.random_models:
        with tempfile.TemporaryDirectory() as folder:
            write_random_model(folder, model)
            prompts = [
                Prompt(distinct_tokens(RANDOM_PROMPT_LEN, args.seed + index), TOKENS, ALL)
                for index in range(args.random_prompts)
            ]
            curve.measure(f"random {model}", folder, prompts, None)
    return curve


def write_csv(path: Path, cells: dict[Key, Acceptance], num_drafts: int) -> None:
    """One row per cell."""
    positions = [f"accepted_{position}" for position in range(1, num_drafts + 1)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        header = ["model", "task", "style", "policy", "budget", "view_tokens"]
        header += ["accepted_length", "low", "high", *positions, "prompts", "steps"]
        writer.writerow(header)
        for (*names, budget), cell in cells.items():
            shares = [f"{share:.4f}" for share in cell.per_position]
            means = [f"{value:.4f}" for value in (cell.length, cell.low, cell.high)]
            row = [*names, budget, f"{cell.view_tokens:.1f}", *means, *shares]
            writer.writerow([*row, cell.num_prompts, cell.num_steps])


def print_tables(cells: dict[Key, Acceptance], args: argparse.Namespace) -> None:
    """Mean accepted length and its interval, one table per model, task and style."""
    console = Console(width=120)
    for model, task, style in dict.fromkeys(key[:3] for key in cells):
        count = next(c.num_prompts for key, c in cells.items() if key[:3] == (model, task, style))
        title = f"{model}, {task}, filler: {style}; {count} prompts, {args.draft_tokens} drafts"
        table = Table("policy", *(f"{budget:.0%}" for budget in args.budgets), title=title)
        for policy in args.policies:
            found = [cells[model, task, style, policy, budget] for budget in args.budgets]
            table.add_row(policy, *(f"{c.length:.2f} ({c.low:.2f}-{c.high:.2f})" for c in found))
        console.print(table)


def plot(path: Path, cells: dict[Key, Acceptance], args: argparse.Namespace) -> None:
    """A panel per task. The probe model's filler is periodic, or plain text is copying: English."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    name = PROBE if args.model is None else args.model.name
    panels = [(RETRIEVAL, ALL), (TEXT, ENGLISH)]
    if args.model is not None:
        panels = [(NEEDLE, ALL), (TEXT, ALL), (SUMMARY, ALL)]
    size = (5.5 * len(panels), 4.5)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True, layout="constrained")
    percent = [100 * budget for budget in args.budgets]
    for axis, (task, style) in zip(axes, panels, strict=True):
        for index, policy in enumerate(args.policies):
            found = [cells[name, task, style, policy, budget] for budget in args.budgets]
            # A little aside, or intervals of different policies would lie on top of each other.
            shifted = [value * 1.03 ** (index - len(args.policies) / 2) for value in percent]
            axis.errorbar(
                shifted,
                [cell.length for cell in found],
                yerr=[[c.length - c.low for c in found], [c.high - c.length for c in found]],
                marker="o",
                markersize=3.5,
                linewidth=1.2,
                elinewidth=0.6,
                capsize=2,
                linestyle="--" if policy == "random" else "-",
                color="0.5" if policy == "random" else f"C{index}",
                label=policy,
            )
        axis.axhline(args.draft_tokens + 1, color="0.8", linewidth=0.8)
        axis.axhline(1, color="0.8", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xticks(percent, [f"{value:g}" for value in percent])
        axis.minorticks_off()
        axis.set_xlabel("view budget (% of the prompt)")
        count = found[0].num_prompts
        filler = f" (filler: {style})" if args.model is None else ""
        title = f"{task}{filler}: {count} prompts, {NUM_TOKENS[task]} tokens each"
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel(f"mean accepted length ({args.draft_tokens} drafts)")
    axes[1].legend(fontsize=8)
    model = "probe model" if args.model is None else name
    figure.suptitle(f"Tokens per verification; {model}, replay on CPU, 95 % over prompts")
    figure.savefig(path, dpi=130)


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    text = "folder of a real model (default: the probe model and random ones)"
    parser.add_argument("--model", type=Path, metavar="DIR", help=text)
    parser.add_argument("--texts", type=Path, nargs="+", default=[], help="of --model; UTF-8")
    parser.add_argument("--policies", nargs="+", default=POLICIES, choices=preset_names())
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=40, help="per task")
    parser.add_argument("--random-prompts", type=int, default=10, help="per random model")
    parser.add_argument("--prompt-tokens", type=int, default=1900, help="of retrieval prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random-models", nargs="*", default=RANDOM_MODELS, choices=RANDOM_MODELS)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out: {args.out} exists; name a new folder")
    if bool(args.texts) != (args.model is not None):
        parser.error("--model and --texts: give both or none")
    torch.set_num_threads(1)
    paths = [args.out, *args.texts, *([args.model] if args.model else [])]
    names = {str(path): path.name for path in paths}  # no paths of this machine
    words = (names.get(word, word) for word in public_words(sys.argv, ROOT))
    run = provenance(" ".join(["python", *words]), ROOT)  # the checkout may change meanwhile
    started = time.monotonic()
    curve = measure(args)
    cells = curve.cells()
    args.out.mkdir(parents=True)
    write_csv(args.out / CSV_NAME, cells, args.draft_tokens)
    about: dict[str, Any] = {
        **run,
        "arguments": vars(args),
        "generated_tokens": NUM_TOKENS,
        "random_prompt_tokens": RANDOM_PROMPT_LEN,
        "right_answers_of_the_whole_cache": {
            style: f"{sum(each)} of {len(each)}" for style, each in curve.right.items()
        },
        "seconds": round(time.monotonic() - started),
    }
    text = json.dumps(about, indent=1, ensure_ascii=False, default=lambda path: path.name) + "\n"
    (args.out / RUN_NAME).write_text(text, encoding="utf-8")
    print_tables(cells, args)
    print(about["right_answers_of_the_whole_cache"])
    plot(args.out / PLOT_NAME, cells, args)
    return 0

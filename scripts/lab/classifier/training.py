"""Train WindowKV's task classifier, or say how good and how fast the committed one is.

Usage::

    # training needs scikit-learn, which the product does not: in an environment of its own
    python3 -m venv .venv-classifier && .venv-classifier/bin/pip install scikit-learn numpy
    PYTHONPATH=. .venv-classifier/bin/python scripts/train_task_classifier.py

    # evaluation needs the product's environment only
    .venv/bin/python scripts/train_task_classifier.py --evaluate
    .venv/bin/python scripts/train_task_classifier.py --evaluate --prompts mine.jsonl

The same versions write the same weights every time. Each line of a ``--prompts`` file is an object
with "prompt" and "task".
"""

import argparse
import json
import platform
import timeit
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lab.classifier.contexts import CONTEXTS, TextSource
from lab.classifier.instructions import TaskPrompt, make_prompts
from lab.places import ROOT
from vllm_kvcompress.core.classifier import (
    FORMAT_VERSION,
    NUM_BUCKETS,
    TASKS,
    WEIGHTS_FILE,
    TaskClassifier,
    features,
    head_and_tail,
)

OUT = ROOT / "vllm_kvcompress" / WEIGHTS_FILE
EDGE_CHARS = 1024  # stands for 256 tokens where there is no tokenizer
TRAIN_EDGES = (768, 1024, 1280)  # tokenizers differ in their characters per token
REGULARISATION = 1.0  # scikit-learn's C; see the docs for how it was chosen
NUM_FOLDS = 4
EVALUATION_SEED = 1  # not the training seed: held-out prompts have words of their own anyway


def train(per_style: int, seed: int, out: Path) -> None:
    """Fit the weights on prompts of the training styles and write them."""
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    prompts = make_prompts("train", per_style, seed)
    print(f"{len(prompts)} prompts", flush=True)
    rows = [
        features(*head_and_tail(prompt.text, TRAIN_EDGES[i % len(TRAIN_EDGES)]))
        for i, prompt in enumerate(prompts)
    ]
    values = np.concatenate([values for _, values in rows]).astype(np.float32)
    buckets = np.concatenate([buckets for buckets, _ in rows])
    starts = np.cumsum([0, *(len(buckets) for buckets, _ in rows)])
    matrix = csr_matrix((values, buckets, starts), shape=(len(rows), NUM_BUCKETS))
    targets = np.array([prompt.task == TASKS[0] for prompt in prompts])

    def fit(chosen: npt.NDArray[np.bool_]) -> LogisticRegression:
        # Both classes count alike, however many prompts they have.
        model = LogisticRegression(
            C=REGULARISATION, solver="liblinear", class_weight="balanced", random_state=0
        )
        return model.fit(matrix[chosen], targets[chosen])

    # Where to cut is decided on styles that a model has not seen: on its own styles any cut is
    # right, and unseen ones fall between the classes.
    styles = sorted({(prompt.task, prompt.style) for prompt in prompts})
    numbers = {style: number for number, style in enumerate(styles)}
    folds = np.array([numbers[p.task, p.style] % NUM_FOLDS for p in prompts])
    unseen = np.zeros(len(prompts))
    for fold in range(NUM_FOLDS):
        unseen[folds == fold] = fit(folds != fold).decision_function(matrix[folds == fold])
    cut, accuracy = best_cut(unseen, targets)
    print(f"styles left out in turn: cut at {cut:.3f}, mean of both recalls {accuracy:.4f}")

    model = fit(np.ones(len(prompts), bool))
    exact = model.coef_[0]
    # Rounded: the last digits of a sum depend on the number of BLAS threads.
    scale = np.float32(round(np.abs(exact).max() / 127, 4))
    np.savez_compressed(
        out,
        version=np.int32(FORMAT_VERSION),
        weights=np.clip(np.rint(exact / scale), -127, 127).astype(np.int8),
        scale=scale,
        bias=np.float32(round(model.intercept_[0] - cut, 3)),
    )
    right = (model.decision_function(matrix) > cut) == targets
    print(f"training accuracy {right.mean():.4f}; {out} has {out.stat().st_size} bytes")


def best_cut(
    margins: npt.NDArray[np.float64], targets: npt.NDArray[np.bool_]
) -> tuple[float, float]:
    """Return the margin that separates best, and the mean of both classes' recalls there."""
    cuts = np.quantile(margins, np.linspace(0.02, 0.98, 97))
    recalls = [
        ((margins[targets] > cut).mean() + (margins[~targets] <= cut).mean()) / 2 for cut in cuts
    ]
    best = int(np.argmax(recalls))
    return float(cuts[best]), float(recalls[best])


def margins(classifier: TaskClassifier, prompts: Sequence[TaskPrompt]) -> list[float]:
    """Return the margin of every prompt, of which both ends of `EDGE_CHARS` are seen."""
    return [classifier.margin(*head_and_tail(prompt.text, EDGE_CHARS)) for prompt in prompts]


def print_report(title: str, classifier: TaskClassifier, prompts: Sequence[TaskPrompt]) -> None:
    """Print confusion matrix, scores of localization, and the accuracy of every style."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    per_style: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for prompt, margin in zip(prompts, margins(classifier, prompts), strict=True):
        guess = TASKS[0] if margin > 0 else TASKS[1]
        counts[prompt.task, guess] += 1
        per_style[prompt.task, prompt.style].append(guess == prompt.task)
    first, second = TASKS
    hits, total = counts[first, first], len(prompts)
    precision = hits / max(hits + counts[second, first], 1)
    recall = hits / max(hits + counts[first, second], 1)
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    print(f"\n{title}: {total} prompts of {len(per_style)} styles")
    print(f"{'':14}{'said ' + first:>20}{'said ' + second:>20}")
    for task in TASKS:
        print(f"{task:14}{counts[task, first]:20}{counts[task, second]:20}")
    accuracy = (hits + counts[second, second]) / total
    print(f"accuracy {accuracy:.3f}; localization: precision {precision:.3f}, ", end="")
    print(f"recall {recall:.3f}, F1 {f1:.3f}")
    for (task, style), right in sorted(per_style.items(), key=lambda item: np.mean(item[1])):
        print(f"  {np.mean(right):.2f}  {task:12}  {style}")


def print_no_instruction(classifier: TaskClassifier, per_kind: int) -> None:
    """Print how often a text without any instruction is called localization."""
    source = TextSource(EVALUATION_SEED, "heldout")
    print("\nTexts without an instruction, share called localization:")
    for kind in CONTEXTS:
        texts = [source.context(kind, 2500) for _ in range(per_kind)]
        said = [classifier.margin(*head_and_tail(text, EDGE_CHARS)) > 0 for text in texts]
        print(f"  {np.mean(said):.2f}  {kind}")


def print_time(classifier: TaskClassifier, prompts: Sequence[TaskPrompt]) -> None:
    """Print the time of one request; the rest of the machine makes it noisy."""
    ends = [head_and_tail(prompt.text, EDGE_CHARS) for prompt in prompts[::5]]
    times = timeit.repeat(lambda: [classifier.classify(*end) for end in ends], number=1, repeat=15)
    micros = sorted(seconds / len(ends) * 1e6 for seconds in times)
    print(
        f"\n{micros[0]:.0f} microseconds per request at best, {micros[7]:.0f} in the median of 15"
    )
    print(f"runs over {len(ends)} prompts on {platform.machine()}, without detokenization. Other")
    print("work on the machine makes this noisy: take the best.")


def read_prompts(path: Path) -> list[TaskPrompt]:
    """Read a file of one JSON object per line."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    for row in rows:
        if row["task"] not in TASKS:
            raise SystemExit(f"{path}: task must be one of {', '.join(TASKS)}, got {row['task']!r}")
    return [TaskPrompt(row["prompt"], row.get("style", path.stem), row["task"]) for row in rows]


def evaluate(per_style: int, path: Path | None) -> None:
    """Print everything that docs/task-classifier.md quotes."""
    classifier = TaskClassifier.load()
    if path is not None:
        print_report(path.name, classifier, read_prompts(path))
        return
    test = make_prompts("test", per_style, EVALUATION_SEED)
    print_report("Test styles, never looked at in training", classifier, test)
    heldout = make_prompts("heldout", per_style, EVALUATION_SEED)
    print_report("Held-out styles, looked at to choose settings", classifier, heldout)
    longbench = make_prompts("longbench", per_style, EVALUATION_SEED)
    print_report("LongBench's tasks in other words", classifier, longbench)
    print_no_instruction(classifier, per_style)
    print_time(classifier, test)


def main(argv: list[str] | None = None) -> None:
    """Train or evaluate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--evaluate", action="store_true", help="judge the committed weights")
    parser.add_argument("--prompts", type=Path, help="with --evaluate: your own labelled prompts")
    parser.add_argument("--per-style", type=int, default=40, help="prompts per style (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training prompts")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write the weights")
    args = parser.parse_args(argv)
    if args.prompts is not None and not args.evaluate:
        parser.error("--prompts needs --evaluate")
    if args.evaluate:
        evaluate(args.per_style, args.prompts)
    else:
        train(args.per_style, args.seed, args.out)

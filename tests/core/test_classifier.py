"""The task classifier: features, weights, and how it does on styles it was not trained on."""

import json
import math
import random
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from lab.classifier.instructions import make_prompts, styles_of
from vllm_kvcompress.core.classifier import (
    NUM_BUCKETS,
    TASKS,
    WEIGHTS_FILE,
    TaskClassifier,
    features,
    head_and_tail,
    label_repeats,
    words_of,
)
from vllm_kvcompress.evaluation.tasks.needle import make_samples

TEXTS = [
    ("", ""),
    ("", "What is the name of the bridge?"),
    ("Summarise the report.\n\n", "End."),
    ("Read  this\n\n\nText:", "a b a b 12 345 ... !!! café \U0001f600"),
    ("合同第3条", "租金是多少？"),
    ("nul\0in\0side", "\0"),
    ("lone \ud800 surrogate", "\udfff"),
    ("<|im_start|>user\nhello", "Input: x\nOutput: y\nInput: z\nOutput:<|im_end|>"),
]
FIRST_BUCKETS = [2391, 4034, 6944, 8461, 9244, 12052]
BUCKETS_CRC = 2149192038
PROMPTS_CRC = 4023492017
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


@pytest.fixture(scope="module")
def classifier() -> TaskClassifier:
    return TaskClassifier.load()


def slow_bucket(value: int, kind: int) -> int:
    mixed = (value ^ (kind * 0xD1B54A32D192ED03 & MASK)) * GOLDEN & MASK
    mixed ^= mixed >> 32
    return (mixed * GOLDEN & MASK) >> 47


def slow_features(head: str, tail: str) -> dict[int, float]:
    """The same features with one loop per n-gram, in Python's own integers."""
    found: dict[int, float] = {}
    for is_tail, text in ((False, head), (True, tail)):
        words = words_of(text)
        if is_tail:
            words = [*words, f"\x04{label_repeats(words)}", "\x03"]
        else:
            words = ["\x02", *words]
        joined = " " + " ".join(words) + " "
        starts = [i for i, char in enumerate(joined[:-1]) if char == " "]

        def add(
            bucket: int, place: int, weight: float, is_tail: bool = is_tail, size: int = len(joined)
        ) -> None:
            distance = size - 1 - place if is_tail else place
            value = round(weight * 64 / (64 + distance) * 16383) / 16383
            found[bucket] = max(found.get(bucket, 0.0), value)

        kind = 16 if is_tail else 0
        crcs = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words]
        for i, crc in enumerate(crcs):
            repeats = is_tail and i == len(words) - 2
            add(slow_bucket(crc, kind + 1), starts[i], 3.0 if repeats else 1.0)
            if i + 1 < len(crcs):
                pair = (crc * GOLDEN + crcs[i + 1]) & MASK
                add(slow_bucket(pair, kind + 2), starts[i], 1.0)
        for length in (3, 4, 5):
            for i in range(len(joined) - length + 1):
                if " " in joined[i + 1 : i + length - 1]:
                    continue
                value = 0
                for char in joined[i : i + length]:
                    value = (value * GOLDEN + ord(char)) & MASK
                add(slow_bucket(value, kind + length), i, 0.3)
    norm = math.sqrt(sum(value * value for value in found.values()))
    return {bucket: value / norm for bucket, value in found.items()}


@pytest.mark.parametrize(("head", "tail"), TEXTS)
def test_features_match_a_slow_transcription(head: str, tail: str) -> None:
    buckets, values = features(head, tail)
    expected = slow_features(head, tail)
    assert buckets.tolist() == sorted(expected)
    np.testing.assert_allclose(values, [expected[b] for b in buckets.tolist()], rtol=1e-12)


def test_buckets_are_the_same_everywhere() -> None:
    """A change here makes the committed weights meaningless."""
    buckets, _ = features("Summarise this", "Who?")
    assert buckets[:6].tolist() == FIRST_BUCKETS
    assert zlib.crc32(buckets.astype("<i4").tobytes()) == BUCKETS_CRC


def test_buckets_do_not_depend_on_the_process() -> None:
    code = (
        "from vllm_kvcompress.core.classifier import features as f; print(f('ab', 'cd')[0].sum())"
    )
    sums = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(sums) == 1


def test_head_and_tail_have_buckets_of_their_own() -> None:
    text = "who signed the contract in spring"
    in_head, in_tail = (set(features(*ends)[0].tolist()) for ends in ((text, ""), ("", text)))
    neither = set(features("", "")[0].tolist())
    assert len((in_head & in_tail) - neither) <= 2  # hashes may collide


def test_words() -> None:
    assert words_of("Der Ärger: 12,5 %!!") == ["der", "ärger", ":", "0", ",", "0", "%", "!"]
    assert words_of("a \n\n b<|eot_id|>c") == ["a", "\n", "b", "\n", "c"]
    assert words_of("x合同y") == ["x", "合", "同", "y"]


def test_label_repeats() -> None:
    assert label_repeats([]) == label_repeats(words_of("one line")) == 0
    assert label_repeats(words_of("In: a\nOut: b\nIn: c\nOut:")) == 1
    assert label_repeats(words_of("Q: a\n" * 9 + "Q: b<|im_end|>\n<|im_start|>assistant\n")) == 3


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 511, 512, 513, 5000])
def test_head_and_tail(length: int) -> None:
    ids = list(range(length))
    head, tail = head_and_tail(ids)
    if length <= 512:
        assert head + tail == ids
    else:
        assert (head, tail) == (ids[:256], ids[-256:])


@pytest.mark.parametrize(("head", "tail"), TEXTS)
def test_any_text_gets_a_task(classifier: TaskClassifier, head: str, tail: str) -> None:
    margin = classifier.margin(head, tail)
    assert math.isfinite(margin)
    assert classifier.margin(head, tail) == margin
    assert classifier.classify(head, tail) == TASKS[0 if margin > 0 else 1]


def test_only_the_outer_ends_of_very_long_inputs_count(classifier: TaskClassifier) -> None:
    question = " Who signed the contract?"
    head, tail = "Contract. " + "x" * 1_000_000, "\n" * 1_000_000 + question
    assert classifier.margin(head, tail) == classifier.margin(head[:5000], tail[-5000:])


def test_the_weights_file(root: Path) -> None:
    path = root / "vllm_kvcompress" / "core" / WEIGHTS_FILE
    assert path.stat().st_size < 300_000
    with np.load(path, allow_pickle=False) as data:
        assert set(data.files) == {"version", "weights", "scale", "bias"}
        assert data["weights"].dtype == np.int8
        assert data["weights"].shape == (NUM_BUCKETS,)


def recalls(classifier: TaskClassifier, split: str) -> dict[str, float]:
    prompts = make_prompts(split, 6, seed=3)
    assert len(prompts) == 6 * len(styles_of(split))
    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    for prompt in prompts:
        guess = classifier.classify(*head_and_tail(prompt.text, 1024))
        right[prompt.task].append(guess == prompt.task)
    return {task: sum(hits) / len(hits) for task, hits in right.items()}


# Floors below what docs/task-classifier.md reports, not goals.
@pytest.mark.parametrize(
    ("split", "localization", "aggregation"),
    [("test", 0.66, 0.80), ("heldout", 0.68, 0.83), ("longbench", 0.80, 0.80)],
)
def test_accuracy_on_styles_not_trained_on(
    classifier: TaskClassifier, split: str, localization: float, aggregation: float
) -> None:
    found = recalls(classifier, split)
    assert found["localization"] >= localization, found
    assert found["aggregation"] >= aggregation, found


def test_the_committed_weights_have_the_documented_accuracy(classifier: TaskClassifier) -> None:
    """The quantised weights give the confusion matrix of docs/task-classifier.md."""
    counts = {(task, guess): 0 for task in TASKS for guess in TASKS}
    for prompt in make_prompts("test", 40, seed=1):
        guess = classifier.classify(*head_and_tail(prompt.text, 1024))
        counts[prompt.task, guess] += 1
    # Other numpy builds may sum in another order: a prompt on the border may change sides.
    assert list(counts.values()) == pytest.approx([851, 309, 173, 1187], abs=3)


def test_needle_prompts_are_localization(classifier: TaskClassifier) -> None:
    for sample in make_samples(6, 800, lambda text: list(text.encode()[::4])):
        assert classifier.classify(*head_and_tail(sample.prompt, 1024)) == "localization"


def test_styles_are_split() -> None:
    texts: dict[str, set[str]] = {}
    for split in ("train", "heldout", "test"):
        styles = styles_of(split)
        texts[split] = {style.before + style.after for style in styles} - {""}
        assert len({(style.task, style.name) for style in styles}) == len(styles)
    assert not texts["train"] & (texts["heldout"] | texts["test"])
    for task in TASKS:
        held, train = (
            sum(style.task == task for split in splits for style in styles_of(split))
            for splits in (("heldout", "test"), ("train",))
        )
        assert held / (held + train) >= 0.25


def test_prompts_are_reproducible() -> None:
    assert make_prompts("train", 1, seed=5) == make_prompts("train", 1, seed=5)
    text = "".join(prompt.text for prompt in make_prompts("train", 1))
    assert "{lb}" not in text and "{noun}" not in text
    assert zlib.crc32(text.encode()) == PROMPTS_CRC


def test_evaluation_of_own_prompts(root: Path, tmp_path: Path) -> None:
    row = {"prompt": "A text about bees.\n\nWho keeps the bees?", "task": "localization"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    script = root / "scripts" / "train_task_classifier.py"
    command = [sys.executable, script, "--evaluate", "--prompts", tmp_path / "mine.jsonl"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
    assert "mine.jsonl: 1 prompts of 1 styles" in out


def test_blanks_take_no_longer_than_words(classifier: TaskClassifier) -> None:
    """A search for line breaks was begun at each of 2,000 blanks, and took 15 times as long."""

    def seconds(text: str) -> float:
        found = []
        for _ in range(5):
            start = time.process_time()
            classifier.margin(text, text)
            found.append(time.process_time() - start)
        return min(found)

    words = seconds("hello word " * 186)
    for odd in (" " * 2048, "\t\x0b\x0c " * 512, "\x0b" * 2047 + "\n", "<|" * 1024, "\n " * 1024):
        assert seconds(odd) < 5 * words, repr(odd[:4])


def test_line_breaks_among_blanks_are_one() -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices(" \t\n\r\x0b\x85a.", k=rng.randrange(40)))
        once = re.sub(r"\s+", lambda run: "\n" if "\n" in run[0] else run[0], text)
        assert words_of(text) == words_of(once)
        assert words_of(text).count("\n") == sum("\n" in run for run in re.findall(r"\s+", text))

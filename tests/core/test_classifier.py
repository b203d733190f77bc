"""The task classifier: features, weights, and how it does on styles it was not trained on."""

import json
import math
import random
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Der Ärger: 12,5 %!!", ["der", "ärger", ":", "0", ",", "0", "%", "!"]),
        ("12a34 \u0661\u0662 a_b", ["0a0", "0", "a_b"]),
        ("!?!? -- ---> __", ["!", "?", "!", "?", "-", "-", ">", "__"]),
        # Line breaks with what is around them are one; other blanks only part words.
        ("a \n\n b\r\n\tc", ["a", "\n", "b", "\n", "c"]),
        ("a\u00a0\x85b\r c", ["a", "b", "c"]),
        # A token of a chat template is a line break: of one to 40 characters in one line.
        ("a \n\n b<|eot_id|>c", ["a", "\n", "b", "\n", "c"]),
        ("a<\uff5cUser\uff5c>b<|x|>c", ["a", "\n", "b", "\n", "c"]),
        (f"a<|{'x' * 40}|>b", ["a", "\n", "b"]),
        (f"<|{'x' * 41}|>", ["<", "|", "x" * 41, "|", ">"]),
        ("<||>", ["<", "|", ">"]),
        ("<|a\nb|>", ["<", "|", "a", "\n", "b", "|", ">"]),
        ("<|a<b|>", ["<", "|", "a", "<", "b", "|", ">"]),
        ("<|a|b|>", ["<", "|", "a", "|", "b", "|", ">"]),
        ("<|a\uff5cb|>", ["<", "|", "a", "\uff5c", "b", "|", ">"]),
        ("<|a>b|>", ["<", "|", "a", ">", "b", "|", ">"]),
        # Scripts without blanks: each character of the first and last of each range is a word.
        ("x\u5408\u540cy", ["x", "\u5408", "\u540c", "y"]),
        (
            "x\u3041x\u30ffx\u3400x\u4dbfx\u4e00x\u9fffx",
            [*"x\u3041x\u30ffx\u3400x\u4dbfx\u4e00x\u9fffx"],
        ),
        ("x\u3105x\ua000x", ["x\u3105x\ua000x"]),
        ("\ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22", ["\ud55c\uad6d\uc5b4", "\u0e44\u0e17\u0e22"]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words_of(text) == expected


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("one line", 0),
        ("In: a\nOut: b\nIn: c\nOut:", 1),
        ("In: a\nIn: b\nOut: c\n\nIn: d\n", 2),
        ("Q: a\n" * 3 + "Q: b", 3),
        ("Q: a\n" * 9 + "Q: b<|im_end|>\n<|im_start|>assistant\n", 3),
        # A label ends with one of these marks, or with the fourth word.
        *((f"is {mark} b\nis {mark} c", 1) for mark in [":", "=", ">", "-", "\uff1a", "->"]),
        ("is ; b\nis ; c", 0),
        (": b\n: c", 1),
        ("a b c d e\na b c d f", 1),
        ("a b c d\na b c e", 0),
        ("a b c\na b", 1),
        ("a b\na b c", 0),
        # What a chat template adds behind the text is no line of it.
        *(
            (f"Q: a\nQ: b\n{role}", 1)
            for role in [
                "assistant",
                "<start_of_turn>model",
                "model",
                "[/INST]",
                "### Response:",
                "Response:",
                "# Answer\n\nAssistant:\n",
            ]
        ),
        ("Q: a\nQ: b\nuser", 0),
        ("[/INST]\nassistant", 0),
    ],
)
def test_label_repeats(text: str, count: int) -> None:
    assert label_repeats(words_of(text)) == count


@pytest.mark.parametrize(
    ("length", "in_head"),
    [
        (0, 0),
        (1, 0),
        (255, 0),
        (256, 0),
        (257, 1),
        (511, 255),
        (512, 256),
        (513, 256),
        (5000, 256),
    ],
)
def test_head_and_tail(length: int, in_head: int) -> None:
    """The tail is filled first."""
    ids = list(range(length))
    assert head_and_tail(ids) == (ids[:in_head], ids[-256:])
    text = "".join(map(chr, ids))
    assert head_and_tail(text, 256) == (text[:in_head], text[-256:])


@pytest.mark.parametrize(("head", "tail"), TEXTS)
def test_any_text_gets_a_task(classifier: TaskClassifier, head: str, tail: str) -> None:
    margin = classifier.margin(head, tail)
    assert math.isfinite(margin)
    assert classifier.margin(head, tail) == margin
    assert classifier.classify(head, tail) == TASKS[0 if margin > 0 else 1]


def test_only_the_outer_ends_of_very_long_inputs_count() -> None:
    """2,048 characters of each, and those to the last one."""
    head, tail = "Contract. " + "x" * 1_000_000, "\n" * 1_000_000 + " Who signed the contract?"

    def found(head: str, tail: str) -> list[list[float]]:
        return [each.tolist() for each in features(head, tail)]

    ends = head[:2048], tail[-2048:]
    assert found(head, tail) == found(*ends)
    for nearly in ((head[:2047], ends[1]), (head[1:], tail), (head, tail[:-1])):
        assert found(*nearly) != found(*ends)


def test_the_weights_file(root: Path) -> None:
    path = root / "vllm_kvcompress" / "core" / WEIGHTS_FILE
    assert path.stat().st_size < 300_000
    with np.load(path, allow_pickle=False) as data:
        assert set(data.files) == {"version", "weights", "scale", "bias"}
        assert data["weights"].dtype == np.int8
        assert data["weights"].shape == (NUM_BUCKETS,)


@pytest.fixture()
def weights_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Writes what is loaded instead of the package's weights."""
    kept = {"version": 1, "weights": np.zeros(NUM_BUCKETS, np.int8), "scale": 1.0, "bias": 0.0}
    found = SimpleNamespace(files=lambda package: tmp_path)
    monkeypatch.setattr("vllm_kvcompress.core.classifier.resources", found)

    def write(**changes: Any) -> None:
        np.savez(tmp_path / WEIGHTS_FILE, **{**kept, **changes})

    return write


@pytest.mark.parametrize(
    "changes",
    [{"version": 2}, {"weights": np.zeros(NUM_BUCKETS // 2, np.int8)}],
    ids=["version", "buckets"],
)
def test_weights_of_other_features_are_refused(
    changes: dict[str, Any], weights_in: Callable[..., None]
) -> None:
    weights_in(bias=0.5)
    assert TaskClassifier.load().margin("", "Who?") == 0.5
    weights_in(**changes)
    with pytest.raises(ValueError, match=r"^classifier\.npz: not weights of format 1\.$"):
        TaskClassifier.load()


def test_a_weights_file_runs_no_code(weights_in: Callable[..., None], tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "has run",)

    weights_in(bias=np.array(Code(), dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        TaskClassifier.load()
    assert not (tmp_path / "has run").exists()


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

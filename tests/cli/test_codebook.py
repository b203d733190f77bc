"""The command `kvcompress codebook`: what it prints and writes, and what it refuses."""

import csv
import json
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import pytest
import yaml

from lab.random_models import distinct_tokens, write_random_model
from vllm_kvcompress.cli.main import main
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.lengths.codebook import coded_groups

Run = Callable[..., tuple[int, str, str]]

REPEATED = distinct_tokens(16, seed=4) * 20


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Call `kvcompress codebook` with arguments; return its status, output and error output."""

    def call(*arguments: str) -> tuple[int, str, str]:
        status = main(["codebook", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_random_model(tmp_path_factory.mktemp("model"), "llama"))


def prompts(folder: Path, *lines: object) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return f"--prompts={path}"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def setting(out: str) -> dict:
    """The first lines for the configuration."""
    lines = out[out.index("layer_groups:") :].splitlines()
    return yaml.safe_load("\n".join(takewhile(str.strip, lines)))


def test_repeated_tokens_pay_in_the_first_layer(run: Run, model: str, tmp_path: Path) -> None:
    """16 tokens, 20 times each: 16 entries there, which every size of books holds."""
    out = tmp_path / "made" / "here"
    given = prompts(tmp_path, REPEATED, {"prompt": REPEATED[::-1]}, [2, 3])
    options = ("--num-prompts=2", "--budget-ratio", "1", "0.5", "--entries", "0.1", "0.3")
    more = ("--agreement=0.97", f"--out={out}", "--device=cpu")
    status, printed, err = run("--model", model, given, *options, *more)
    assert status == 0, err
    assert "2 prompts of" in printed and "320 to 320 tokens" in printed
    assert "all tokens: books" in printed and "50% of the prompt kept: books" in printed
    assert "Layer groups that pay: 0 of 4, with entries for 10% of the coded tokens." in printed
    # A code's length has 11 bits, and the model's weights are random: one near tie falls otherwise.
    assert "63 of 64 next tokens" in printed and "all of them in 1 of 2 prompts" in printed
    found = setting(printed)
    config = parse_config({"preset": "snapkv", **found})
    assert config is not None
    assert coded_groups(config.codebook, 4) == {0: 0.1}
    spindle = rows(out / "spindle.csv")
    assert len(spindle) == 2 * 4 * 2
    assert spindle[0] == {
        "ratio": "1",
        "layer": "0",
        "kind": "keys",
        "coded_tokens": "320",
        "entries_mean": "0.05",
        "entries_max": "0.05",
        "tokens_per_entry": "20",
        "alone": "0",
        "build_seconds_per_1k": spindle[0]["build_seconds_per_1k"],
        "prompts": "2",
    }
    assert float(spindle[0]["build_seconds_per_1k"]) > 0
    entries = rows(out / "entries.csv")
    assert len(entries) == 2 * 4 * 3
    assert [row["entries"] for row in entries[:3]] == ["needed", "0.1", "0.3"]
    # bfloat16 of head_dim 32: a slot holds the codes of 8 tokens. 32 and 96 entries, 48 code rows.
    assert [float(row["slots"]) for row in entries[:3]] == [64 / 320, 80 / 320, 144 / 320]
    assert (out / "spindle.png").stat().st_size > 1000
    about = json.loads((out / "run.json").read_text())
    assert about["recommended"]["1"] == {"groups": [0], "share": 0.1, "saving": 0.1875}
    assert about["prompt_tokens"] == [320, 320] and about["device"] == "cpu"
    read = rows(out / "decoding.csv")
    assert len(read) == 2 * 2 * 4
    parts = ["0", "0 1", "0 1 2", "0 1 2 3"]
    assert [(row["layers"], row["entries"]) for row in read[:8]] == [
        (part, share) for share in ("0.1", "0.3") for part in parts
    ]


def test_no_layer_pays(run: Run, model: str, tmp_path: Path) -> None:
    """No token twice, random weights: nothing is alike."""
    given = prompts(tmp_path, distinct_tokens(160))
    options = ("--budget-ratio=1", "--entries=0.5", "--layer-groups=2", "--device=cpu")
    status, printed, err = run("--model", model, given, *options)
    assert status == 0, err
    assert "No layer pays: with no size of the books do 98% of the next tokens stay" in printed
    assert "codebook:" not in printed


def test_layer_groups_are_coded_whole(run: Run, model: str, tmp_path: Path) -> None:
    given = prompts(tmp_path, REPEATED[:160])
    options = ("--budget-ratio=1", "--entries", "0.1", "0.4", "--layer-groups=2")
    out = tmp_path / "out"
    status, _, err = run("--model", model, given, *options, f"--out={out}", "--device=cpu")
    assert status == 0, err
    found = [(row["layers"], row["entries"]) for row in rows(out / "decoding.csv")]
    assert found == [("0 1", "0.1"), ("0 1 2 3", "0.1"), ("0 1", "0.4"), ("0 1 2 3", "0.4")]


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        (["text"], [], ["--model:", "holds no tokenizer", "--prompts FILE.jsonl"]),
        ([{"text": "a"}], [], ["prompts.jsonl:1: holds no prompt", "field prompt"]),
        ([REPEATED, [1.5, 2]], [], ["prompts.jsonl:2: holds no prompt"]),
        ([REPEATED, []], [], ["prompts.jsonl:2: holds no prompt"]),
        ([REPEATED[:15]], [], ["one has 15 tokens", "--block-size 16"]),
        ([REPEATED], ["--prompt-len=12"], ["one has 12 tokens"]),
        ([REPEATED * 20], [], ["one has 6400 tokens", "are 4096", "--prompt-len"]),
        ([REPEATED * 20], ["--prompt-len=4065"], ["one has 4065 tokens, 32 more are read"]),
        ([[1536] * 20], [], ["token ids must be in 0 to 1535"]),
        ([[-1] * 20], [], ["token ids must be in 0 to 1535"]),
        ([REPEATED], ["--kv-compression=none"], ["names no survivors", "--budget-ratio 1"]),
        ([REPEATED], ["--kv-compression=windowkv"], ["tasks:", "depends on a request's task"]),
        ([REPEATED], ["--model=nowhere"], ["--model", "no folder nowhere"]),
        ([REPEATED], ["--device=moon"], ["--model, --device:", "moon"]),
        ([REPEATED], ["--out=."], ["--out: . exists; name a new folder."]),
        ([REPEATED], ["--prompts=none.txt"], ["none.txt"]),
    ],
)
def test_errors_are_one_sentence(
    run: Run, model: str, tmp_path: Path, lines: list, options: list[str], words: list[str]
) -> None:
    status, out, err = run("--model", model, prompts(tmp_path, *lines), *options)
    assert (status, out) == (1, "")
    found = err[err.index("kvcompress: error: ") :]
    assert found.count("\n") == 1
    for word in words:
        assert word in found


def test_empty_and_broken_files_are_refused(run: Run, model: str, tmp_path: Path) -> None:
    for name, text, word in (
        ("empty.txt", "\n \n", "holds no prompt"),
        ("broken.jsonl", '\n["a"', "broken.jsonl:2: not valid JSON"),
    ):
        (tmp_path / name).write_text(text)
        status, out, err = run("--model", model, f"--prompts={tmp_path / name}")
        assert (status, out) == (1, "")
        assert word in err


def test_texts_and_needle_prompts_are_tokenized(run: Run, probe_model: str, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("The grass is green. " * 12 + "\n\nThe sky is blue.\n")
    base = ("--model", probe_model, "--budget-ratio=1", "--entries=0.5", "--device=cpu")
    cut = ("--num-prompts=1", "--prompt-len=40")
    status, printed, err = run(*base, f"--prompts={tmp_path / 'texts.txt'}", *cut)
    assert status == 0, err
    assert "1 prompts of" in printed and "40 to 40 tokens" in printed
    status, printed, err = run(*base, "--num-prompts=1", "--prompt-len=200")
    assert status == 0, err
    assert "1 needle prompts, " in printed and "to 200 tokens" in printed
    status, printed, err = run(*base, "--prompt-len=20")
    assert (status, printed) == (1, "")
    assert "--prompt-len: num_tokens=20 is too short" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--model"]),
        (["--budget-ratio", "1.5"], ["--budget-ratio", "must be above 0 and at most 1, got 1.5"]),
        (["--entries", "0"], ["--entries", "must be above 0 and at most 1, got 0"]),
        (["--key-threshold", "2"], ["--key-threshold", "at most 1, got 2"]),
        (["--agreement", "1.1"], ["--agreement", "at most 1, got 1.1"]),
        (["--prompt-len", "0"], ["--prompt-len", "must be 1 or more, got 0"]),
    ],
)
def test_wrong_usage_ends_with_2(options: list[str], words: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["codebook", *options])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    for word in words:
        assert word in err

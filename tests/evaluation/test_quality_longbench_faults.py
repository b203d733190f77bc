"""Files of LongBench that cannot be read: one sentence names file, line and field."""

import json
from pathlib import Path
from typing import Any

import pytest

# Metric and answer length of every dataset of LongBench, from its eval.py and dataset2maxlen.json.
from tests.evaluation.longbench_rows import PUBLISHED, row_of, sentence, v2_row, without, write
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality.longbench import longbench_samples


@pytest.mark.parametrize(
    "row, place",
    [
        (7, ": allowed is an object"),
        (without(row_of(), "context"), ": context: allowed is a text, got None"),
        (row_of(context=""), ": context: the text is empty"),
        (row_of(context=["a"]), ": context: allowed is a text, got ['a']"),
        (row_of(context="half \ud83d"), ": context: the text holds half a character"),
        (without(row_of(), "input"), ": input: allowed is a text, got None"),
        (row_of(input=3), ": input: allowed is a text, got 3"),
        (without(row_of(), "answers"), ": answers: allowed is a list of texts, got None"),
        (row_of(answers="yes"), ": answers: allowed is a list of texts, got 'yes'"),
        (row_of(answers=[]), ": answers: at least one text must not be empty"),
        (row_of(answers=[" "]), ": answers: at least one text must not be empty"),
        (row_of(answers=["yes", 3]), ": answers: allowed is a text, got 3"),
        (row_of("trec", all_classes=None), ": all_classes: allowed is a list of texts"),
        (row_of("trec", all_classes=[]), ": all_classes: at least one text"),
        (row_of(dataset=""), ": dataset: the text is empty"),
        ({**row_of(), "dataset": None}, ": dataset: allowed is a text, got None"),
        (row_of(_id=3), ": _id: allowed is a text, got 3"),
        (row_of(metric="f1"), ": metric: allowed are qa_f1, "),
        (row_of(metric=["f1"]), ": metric: allowed are qa_f1, "),
        (v2_row(answer="E"), ": answer: allowed are A, B, C and D, got 'E'"),
        (v2_row(answer=None), ": answer: allowed are A, B, C and D, got None"),
        (v2_row(choice_B=2), ": choice_B: allowed is a text, got 2"),
        (without(v2_row(), "choice_A"), ": choice_A: allowed is a text, got None"),
        (without(v2_row(), "question"), ": question: allowed is a text, got None"),
        (v2_row(context=""), ": context: the text is empty"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(row: Any, place: str, tmp_path: Path) -> None:
    path = tmp_path / "hotpotqa.jsonl"
    path.write_text("\n".join(["", json.dumps(row_of(number=9)), json.dumps(row)]) + "\n")
    assert sentence(tmp_path).startswith(f"{path}:3{place}")
    with pytest.raises(ConfigError):  # rows that are not drawn are looked at too
        longbench_samples(tmp_path, 1, 0)


def test_a_bad_row_of_a_list_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", [v2_row(), v2_row(1, answer="?")])
    assert sentence(tmp_path).startswith(f"{path}: sample 2: answer: ")


def test_an_unknown_dataset_lists_the_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a long path would be shortened
    write(Path("hotpot_qa.jsonl"), row_of("hotpot_qa"))
    found = sentence(Path("."))
    assert found.startswith(
        "hotpot_qa.jsonl:1: dataset: unknown dataset 'hotpot_qa' (did you mean 'hotpotqa'?); "
        "known are narrativeqa, "
    )
    assert all(dataset in found for dataset in PUBLISHED)
    assert found.endswith("; others need a field metric.")


def test_an_unknown_dataset_is_not_known_by_a_prompt_alone(tmp_path: Path) -> None:
    write(tmp_path / "nq.jsonl", row_of("nq"))
    write(tmp_path / "dataset2prompt.json", {"nq": "{context}{input}"})
    assert "unknown dataset 'nq'" in sentence(tmp_path)


def test_ids_must_differ(tmp_path: Path) -> None:
    path = write(tmp_path / "hotpotqa.jsonl", row_of(), row_of(number=1), row_of())
    assert sentence(tmp_path) == (
        f"{path}:3: _id: ids must differ, got 'hotpotqa-0' as in {path}:1."
    )


@pytest.mark.parametrize(
    "content, fault",
    [
        (b'{"a": 1}\n{"a": \n', ":2: not valid JSON"),
        pytest.param(b"[" * 100_000, ":1: not valid JSON", marks=pytest.mark.deep),
        (b"9" * 5000, ":1: not valid JSON"),
        (b"\n\xff\xfe\n", ":2: this is not UTF-8 text (byte 0xff at 0)"),
    ],
)
def test_lines_that_cannot_be_read(content: bytes, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "hotpotqa.jsonl"
    path.write_bytes(content.replace(b'{"a": 1}', json.dumps(row_of()).encode()))
    assert sentence(tmp_path).startswith(f"{path}{fault}")


@pytest.mark.parametrize(
    "content, fault",
    [
        (b"[\n{},\n", ":3: not valid JSON"),
        (b"", ":1: not valid JSON"),
        pytest.param(b"[" * 100_000, ": not valid JSON", marks=pytest.mark.deep),
        (b"\xff", ": this is not UTF-8 text (byte 0xff at 0)"),
        (b"3", ": allowed is a list of samples, got 3"),
        (b"[3]", ": sample 1: allowed is an object"),
    ],
)
def test_lists_that_cannot_be_read(content: bytes, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    assert sentence(tmp_path).startswith(f"{path}{fault}")


def test_folders_without_samples(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert sentence(missing) == f"{missing}: there is no such folder."
    assert sentence(tmp_path).startswith(f"{tmp_path}: holds no samples: allowed are ")
    (tmp_path / "hotpotqa.jsonl").write_text("\n")
    (tmp_path / "data.json").write_text("[]")
    assert "holds no samples" in sentence(tmp_path)
    (tmp_path / "musique.jsonl").mkdir()
    assert sentence(tmp_path).startswith(f"{tmp_path / 'musique.jsonl'}: cannot be read")

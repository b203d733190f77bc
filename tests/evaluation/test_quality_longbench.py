"""LongBench's files become samples."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

# Metric and answer length of every dataset of LongBench, from its eval.py and dataset2maxlen.json.
from tests.evaluation.longbench_rows import (
    PUBLISHED,
    WITHOUT_INPUT,
    row_of,
    sentence,
    v2_row,
    without,
    write,
)
from vllm_kvcompress.evaluation.quality.longbench import longbench_samples, middle_cut
from vllm_kvcompress.evaluation.quality.metrics import METRICS
from vllm_kvcompress.evaluation.quality.sample import Sample

# --- what is read


@pytest.mark.parametrize("dataset", PUBLISHED)
def test_every_dataset_has_its_metric_and_answer_length(dataset: str, tmp_path: Path) -> None:
    write(tmp_path / f"{dataset}.jsonl", row_of(dataset))
    (sample,) = longbench_samples(tmp_path, None, 0)
    assert (sample.metric, sample.max_tokens) == PUBLISHED[dataset]
    assert (sample.task, sample.name) == (dataset, f"{dataset}-0")
    assert sample.answers == ("Paragraph 3",)
    assert sample.context.endswith("The long {text}.")
    assert sample.context.count("The long") == (sample.context + sample.question).count("The long")
    assert sample.question.count("What {is} asked?") == (dataset not in WITHOUT_INPUT)
    assert sample.question
    assert sample.choices == (("Paragraph 3", "other") if dataset in ("trec", "lsht") else ())
    assert (sample.length, sample.depth, sample.answer_prefix) == (0, None, "")


def test_few_shot_prompts_end_where_the_answer_begins(tmp_path: Path) -> None:
    for dataset in ("trec", "triviaqa", "samsum", "lsht"):
        write(tmp_path / f"{dataset}.jsonl", row_of(dataset, input="Question: ...\nAnswer:"))
    for sample in longbench_samples(tmp_path, None, 0):
        assert sample.question.endswith("\n\nQuestion: ...\nAnswer:")


def test_the_subfolder_data_and_longbench_e(tmp_path: Path) -> None:
    write(tmp_path / "data" / "hotpotqa.jsonl", row_of(), row_of(number=1))
    write(tmp_path / "data" / "hotpotqa_e.jsonl", row_of(), row_of(number=1, dataset="hotpotqa_e"))
    write(tmp_path / "data" / "trec_e.jsonl", without(row_of("trec"), "dataset"))
    samples = longbench_samples(tmp_path, None, 0)
    assert [(sample.task, sample.name) for sample in samples] == [
        ("hotpotqa", "hotpotqa-0"),
        ("hotpotqa", "hotpotqa-1"),
        ("hotpotqa_e", "hotpotqa-0"),
        ("hotpotqa_e", "hotpotqa_e-1"),
        ("trec_e", "trec-0"),
    ]
    assert [sample.metric for sample in samples] == ["qa_f1"] * 4 + ["classification"]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_longbench_v2(name: str, tmp_path: Path) -> None:
    if name.endswith("l"):
        write(tmp_path / name, v2_row(0), v2_row(1, answer="A"))
    else:
        write(tmp_path / name, [v2_row(0), v2_row(1, answer="A")])
    first, second = longbench_samples(tmp_path, None, 0)
    assert (first.task, first.name, first.answers) == ("longbench_v2", "v2-0", ("C",))
    assert (second.name, second.answers) == ("v2-1", ("A",))
    assert first.context.endswith("A contract.")
    assert "Which {one}?\n(A) first\n(B) second\n(C) third\n(D) fourth\n" in first.question
    assert (first.metric, first.max_tokens) == ("choice", 128)
    assert METRICS["choice_strict"]("The correct answer is (C)", first) == 1.0


def test_odd_but_right_files(tmp_path: Path) -> None:
    row = row_of(context="one\u2028line\x85still")
    text = "\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n\n  \n"
    no_id = json.dumps(without(row_of(number=1), "_id"))
    (tmp_path / "hotpotqa.jsonl").write_text(text + no_id, encoding="utf-8", newline="")
    (tmp_path / "result.json").write_text('{"hotpotqa": 31.5}', encoding="utf-8")
    (tmp_path / "README.md").write_text("no samples", encoding="utf-8")
    first, second = longbench_samples(tmp_path, None, 0)
    assert first.context.endswith("one\u2028line\x85still")
    assert second.name == "hotpotqa.jsonl:4"


def test_empty_right_answers_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "hotpotqa.jsonl", row_of(answers=["", "yes", " "]))
    assert longbench_samples(tmp_path, None, 0)[0].answers == ("yes",)


def test_own_datasets_name_their_metric(tmp_path: Path) -> None:
    write(tmp_path / "handbook.jsonl", row_of("handbook", metric="any_in"))
    write(tmp_path / "hotpotqa.jsonl", row_of(metric="any_in"))
    own, known = longbench_samples(tmp_path, None, 0)
    assert (own.task, own.metric, own.max_tokens) == ("handbook", "any_in", 128)
    assert "What {is} asked?" in own.question
    assert (known.task, known.metric, known.max_tokens) == ("hotpotqa", "any_in", 32)


# --- the draw


def names(samples: list[Sample]) -> list[str]:
    return [sample.name for sample in samples]


def test_a_count_per_dataset_is_drawn_with_the_seed(tmp_path: Path) -> None:
    for dataset in ("hotpotqa", "musique"):
        rows = [row_of(dataset, number) for number in range(30)]
        write(tmp_path / f"{dataset}.jsonl", *rows)
    drawn = longbench_samples(tmp_path, 5, seed=1)
    tasks = [sample.task for sample in drawn]
    assert tasks == ["hotpotqa"] * 5 + ["musique"] * 5
    numbers = [int(sample.name.split("-")[1]) for sample in drawn]
    assert numbers[:5] == sorted(set(numbers[:5])) and numbers[5:] == sorted(set(numbers[5:]))
    assert numbers[:5] != numbers[5:] and numbers[:5] != list(range(5))
    assert longbench_samples(tmp_path, 5, seed=1) == drawn
    assert longbench_samples(tmp_path, 5, seed=2) != drawn
    assert set(names(drawn)) < set(names(longbench_samples(tmp_path, 6, seed=1)))
    assert len(longbench_samples(tmp_path, 31, 1)) == len(longbench_samples(tmp_path, None, 1))
    assert longbench_samples(tmp_path, 0, seed=1) == []


def test_the_draw_looks_at_ids_and_not_at_the_order_of_rows(tmp_path: Path) -> None:
    rows = [row_of(number=number) for number in range(30)]
    write(tmp_path / "a" / "hotpotqa.jsonl", *rows)
    write(tmp_path / "b" / "hotpotqa.jsonl", *reversed(rows))
    first = names(longbench_samples(tmp_path / "a", 7, 0))
    assert names(longbench_samples(tmp_path / "b", 7, 0)) == first[::-1]


def test_every_sample_is_drawn_by_some_seed(tmp_path: Path) -> None:
    write(tmp_path / "hotpotqa.jsonl", *(row_of(number=number) for number in range(10)))
    drawn = [names(longbench_samples(tmp_path, 2, seed)) for seed in range(60)]
    times = [sum(f"hotpotqa-{number}" in each for each in drawn) for number in range(10)]
    assert sum(times) == 120 and min(times) >= 3 and max(times) <= 25


# --- the published configuration


@pytest.mark.parametrize("place", ["", "config"])
def test_published_prompts_and_lengths_are_used(place: str, tmp_path: Path) -> None:
    write(tmp_path / "hotpotqa_e.jsonl", row_of())
    write(tmp_path / "gov_report.jsonl", row_of("gov_report"))
    prompts = {
        "hotpotqa": "Read: {context} {{so}}\nTell: {input} ({language})\n",
        "nq": "{context}",
    }
    write(tmp_path / place / "dataset2prompt.json", prompts)
    write(tmp_path / place / "dataset2maxlen.json", {"hotpotqa": 7, "nq": 1})
    report, sample = longbench_samples(tmp_path, None, 0)
    assert sample.context == "Read: The long {text}."
    assert sample.question == " {so}\nTell: What {is} asked? (en)\n"
    assert (sample.max_tokens, sample.metric) == (7, "qa_f1")
    assert report.max_tokens == 512


@pytest.mark.parametrize(
    "prompt, fault",
    [
        ("no text", "a prompt needs the field {context} once"),
        ("{context}{context}", "a prompt needs the field {context} once"),
        ("{context", "not a prompt with fields in braces"),
        ("{context:>8}", "allowed are plain fields"),
        ("{context!r}", "allowed are plain fields"),
        (" ", "the text is empty"),
        (7, "allowed is a text, got 7"),
    ],
)
def test_bad_published_prompts(prompt: Any, fault: str, tmp_path: Path) -> None:
    write(tmp_path / "hotpotqa.jsonl", row_of())
    path = write(tmp_path / "dataset2prompt.json", {"hotpotqa": prompt})
    assert sentence(tmp_path).startswith(f"{path}: hotpotqa: {fault}")


@pytest.mark.parametrize("length", [0, -1, "32", 3.5, True, None])
def test_bad_published_lengths(length: Any, tmp_path: Path) -> None:
    write(tmp_path / "hotpotqa.jsonl", row_of())
    path = write(tmp_path / "dataset2maxlen.json", {"hotpotqa": length})
    assert sentence(tmp_path) == (
        f"{path}: hotpotqa: allowed is a number of tokens of at least 1, got {length!r}."
    )


def test_a_prompt_with_a_field_that_the_row_lacks(tmp_path: Path) -> None:
    path = write(tmp_path / "hotpotqa.jsonl", row_of())
    write(tmp_path / "dataset2prompt.json", {"hotpotqa": "{context}{query}"})
    assert sentence(tmp_path).startswith(f"{path}:1: query: ")


def test_a_configuration_that_is_no_object(tmp_path: Path) -> None:
    write(tmp_path / "hotpotqa.jsonl", row_of())
    path = write(tmp_path / "config" / "dataset2maxlen.json", ["hotpotqa"])
    assert sentence(tmp_path).startswith(f"{path}: allowed is an object of datasets")


# --- middle_cut


@pytest.mark.parametrize(
    "limit, left",
    [(1, [0]), (2, [0, 9]), (3, [0, 1, 9]), (4, [0, 1, 8, 9]), (10, list(range(10)))],
)
def test_middle_cut_by_hand(limit: int, left: list[int]) -> None:
    assert middle_cut(list(range(10)), limit) == left


@given(st.lists(st.integers(0, 99), max_size=30), st.integers(1, 40))
def test_middle_cut_keeps_both_ends(ids: list[int], limit: int) -> None:
    before = list(ids)
    cut = middle_cut(ids, limit)
    assert ids == before and cut is not ids
    assert len(cut) == min(len(ids), limit)
    head = len(cut) - len(cut) // 2
    assert cut[:head] == ids[:head]
    assert cut[head:] == ids[len(ids) - len(cut) // 2 :]
    if limit % 2 == 0 and len(ids) > limit:  # the published rule
        assert cut == ids[: limit // 2] + ids[-(limit // 2) :]


def test_middle_cut_needs_a_limit() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        middle_cut([1, 2], 0)

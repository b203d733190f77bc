"""Metrics give the numbers of their published definitions, and never fail on an odd answer."""

import re
import string
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality import metrics
from vllm_kvcompress.evaluation.quality.metrics import METRICS, check_packages
from vllm_kvcompress.evaluation.quality.sample import Sample


def sample_of(*answers: str, choices: tuple[str, ...] = (), prefix: str = "") -> Sample:
    return Sample(
        name="0",
        task="test",
        context="",
        question="",
        answers=answers,
        metric="",
        max_tokens=8,
        answer_prefix=prefix,
        choices=choices,
    )


def lcs(left: list[str] | str, right: list[str] | str) -> int:
    """Length of the longest common sequence, by the textbook's table."""
    row = [0] * (len(right) + 1)
    for each in left:
        old = row[:]
        for index, other in enumerate(right, start=1):
            row[index] = old[index - 1] + 1 if each == other else max(old[index], row[index - 1])
    return row[-1]


def f1_of_bags(left: list[str], right: list[str]) -> float:
    same = sum(min(left.count(token), right.count(token)) for token in set(left))
    if not same:
        return 0.0
    precision, recall = same / len(left), same / len(right)
    return 2 * precision * recall / (precision + recall)


# --- qa_f1


@pytest.mark.parametrize(
    "answer, right, score",
    [
        ("The cat sat.", "a cat", 2 / 3),  # {cat, sat} against {cat}: P 1/2, R 1
        ("Paris", "paris!", 1.0),
        ("London", "Paris", 0.0),
        ("to be or not to be", "to be", 2 * (2 / 6) * 1 / (2 / 6 + 1)),  # each word counts once
        ("U.S.A.", "usa", 1.0),
        ("well-known", "wellknown", 1.0),  # a mark is dropped, not made a space
        ("An apple", "apple", 1.0),
        ("north«the»west", "north« »west", 1.0),  # an article between marks parts words
        ("the", "the", 0.0),  # nothing is left of it
        ("", "Paris", 0.0),
    ],
)
def test_qa_f1_by_hand(answer: str, right: str, score: float) -> None:
    assert METRICS["qa_f1"](answer, sample_of(right)) == pytest.approx(score)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="aAnhe t«.,'_é-x1\n", max_size=30), st.text("athe nx.«1", max_size=20))
def test_qa_f1_is_the_published_formula(answer: str, right: str) -> None:
    def words(text: str) -> list[str]:
        text = "".join(each for each in text.lower() if each not in string.punctuation)
        return re.sub(r"\b(?:the|an|a)\b", " ", text).split()

    expected = f1_of_bags(words(answer), words(right))
    assert METRICS["qa_f1"](answer, sample_of(right)) == pytest.approx(expected)


def test_the_best_of_several_right_answers_counts() -> None:
    several = sample_of("red wine", "blue", "green")
    assert METRICS["qa_f1"]("It is blue", several) == pytest.approx(0.5)
    assert METRICS["rouge_l"]("It is blue", several) == pytest.approx(0.5)
    assert METRICS["count"]("7", sample_of("6", "7")) == 1.0


def test_only_the_first_line_counts_after_few_shot_prompts() -> None:
    answer = "\nblue\nQuestion: what else?"
    assert METRICS["qa_f1_first_line"](answer, sample_of("blue")) == 1.0
    assert METRICS["qa_f1"](answer, sample_of("blue")) < 1
    assert METRICS["rouge_l_first_line"](answer, sample_of("blue")) == pytest.approx(1.0)
    assert METRICS["rouge_l"](answer, sample_of("blue")) < 1


@pytest.mark.parametrize(
    "answer, right, score",
    [
        ("北京市。", "北京", 0.8),  # three characters against two
        ("《红楼梦》", "红楼梦", 1.0),
        ("２ 天", "２天", 1.0),
        ("＋北京～", "北京", 1.0),
        ("2019年", "2018年", 0.5),  # the year is one piece
        ("iPhone手机", "iphone", 0.5),
        ("。，", "北京", 0.0),
    ],
)
def test_qa_f1_zh_by_hand(answer: str, right: str, score: float) -> None:
    assert METRICS["qa_f1_zh"](answer, sample_of(right)) == pytest.approx(score)


# --- ROUGE-L


@pytest.mark.parametrize(
    "answer, right, score",
    [
        # LCS "the cat the mat", counted as 3 different words; 4 and 5 different words.
        ("the cat on the mat", "the cat sat under the mat", 2 * 3 / (4 + 5)),
        ("one two three", "three two one", 2 * 1 / 6),
        ("same words here", "same words here", 1.0),
        ("nothing alike", "quite different", 0.0),
        ("...", "words", 0.0),
        ("words", "...", 0.0),
    ],
)
def test_rouge_l_by_hand(answer: str, right: str, score: float) -> None:
    assert METRICS["rouge_l"](answer, sample_of(right)) == pytest.approx(score, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.permutations("abcdefgh"), st.permutations("defghijk"))
def test_rouge_l_of_one_sentence_of_different_words(left: list[str], right: list[str]) -> None:
    expected = 2 * lcs(left, right) / (len(left) + len(right))
    found = METRICS["rouge_l"](" ".join(left), sample_of(" ".join(right)))
    assert found == pytest.approx(expected, abs=1e-6)


def test_rouge_l_of_a_sentence_longer_than_pythons_stack() -> None:
    words = " ".join(f"w{index}" for index in range(1100))
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    try:
        score = METRICS["rouge_l"](words, sample_of(words))
    finally:
        sys.setrecursionlimit(before)
    assert score == pytest.approx(1.0, abs=1e-6)


def test_rouge_l_zh_goes_by_characters() -> None:
    assert METRICS["rouge_l_zh"]("会议通过预算", sample_of("会议讨论预算")) == pytest.approx(
        4 / 6, abs=1e-6
    )
    assert METRICS["rouge_l"]("会议通过预算", sample_of("会议讨论预算")) == 0.0


# --- classification

CLASSES = ("number", "phone number", "human", "human group", "city")


@pytest.mark.parametrize(
    "answer, right, score",
    [
        ("It is a city", "city", 1.0),
        ("city or human", "city", 0.5),
        ("phone number", "phone number", 1.0),  # "number" is part of the right one
        ("phone number", "number", 0.5),  # but not the other way round
        ("number", "phone number", 0.0),
        ("human group, city, number", "human group", 1 / 3),
        ("City", "city", 0.0),  # case matters
        ("\ncity\nhuman", "city", 1.0),  # only the first line
        ("human\ncity", "city", 0.0),
        ("none of these", "city", 0.0),
        ("", "city", 0.0),
    ],
)
def test_classification_by_hand(answer: str, right: str, score: float) -> None:
    found = METRICS["classification"](answer, sample_of(right, choices=CLASSES))
    assert found == pytest.approx(score)


def test_all_classes_within_the_right_one_are_left_out() -> None:
    # The published code, which removes from the list it walks through, leaves "b" in.
    sample = sample_of("a b c", choices=("a", "b", "a b c"))
    assert METRICS["classification"]("a b c", sample) == 1.0


# --- code


@pytest.mark.parametrize(
    "answer, right, score",
    [
        ("return x", "return x", 1.0),
        ("kitten", "sitting", 2 * 4 / 13),  # "ittn"
        ("\n\nreturn x\nreturn y", "return x", 1.0),
        ("# first a note\n// another\n```python\nreturn x", "return x", 1.0),
        ("# only a note", "return x", 0.0),
        ("abc", "xyz", 0.0),
        ("  \nreturn x", "return x", 0.2),  # as published: white space is a line; one space fits
    ],
)
def test_edit_similarity_by_hand(answer: str, right: str, score: float) -> None:
    assert METRICS["edit_similarity"](answer, sample_of(right)) == pytest.approx(score)


@settings(max_examples=200, deadline=None)
@given(st.text("abc= ", min_size=1, max_size=20), st.text("abc= ", min_size=1, max_size=20))
def test_edit_similarity_is_that_of_the_longest_common_sequence(answer: str, right: str) -> None:
    expected = 2 * lcs(answer, right) / (len(answer) + len(right)) if answer.strip() else 0.0
    assert METRICS["edit_similarity"](answer, sample_of(right)) == pytest.approx(expected)


# --- numbers


@pytest.mark.parametrize(
    "metric, answer, right, score",
    [
        ("count", "17", "17", 1.0),
        ("count", "17 of 20", "17", 0.5),
        ("count", "017", "17", 0.0),
        ("count", "seventeen", "17", 0.0),
        ("retrieval", "Paragraph 15", "Paragraph 15", 1.0),
        ("retrieval", "15", "Paragraph 15", 1.0),
        ("retrieval", "Paragraph 15, not Paragraph 3 or 4", "Paragraph 15", 1 / 3),
        ("retrieval", "Paragraph 1", "Paragraph 15", 0.0),
        ("retrieval", "段落7", "段落7", 1.0),
        ("retrieval", "7", "9段中的段落7", 1.0),
        ("retrieval", "7", "7", 1.0),
        ("retrieval", "7", "no number", 0.0),
    ],
)
def test_numbers_by_hand(metric: str, answer: str, right: str, score: float) -> None:
    assert METRICS[metric](answer, sample_of(right)) == pytest.approx(score)


# --- choice


@pytest.mark.parametrize(
    "answer, strict, letter",
    [
        ("The correct answer is (B)", "B", "B"),
        ("**The correct answer is (B).**", "B", "B"),
        ("The correct answer is **(B)**", "B", "B"),
        ("The correct answer is B because", "B", "B"),
        ("The correct answer is A. Not: The correct answer is (B)", "B", "B"),
        ("the correct answer is (B)", None, "B"),
        ("B", None, "B"),
        ("B. It says so", None, "B"),
        ("(B) is right, (C) is not", None, "B"),
        ("Answer: B", None, "B"),
        ("So the answer is (B), I think", None, "B"),
        ("I take (B)", None, "B"),
        ("Either (B) or (C)", None, None),
        ("A dog", None, None),
        ("Both are wrong", None, None),
        ("E", None, None),
        ("", None, None),
    ],
)
def test_choice_by_hand(answer: str, strict: str | None, letter: str | None) -> None:
    for right in "ABCD":
        assert METRICS["choice_strict"](answer, sample_of(right)) == float(right == strict)
        assert METRICS["choice"](answer, sample_of(right)) == float(right == letter)


def test_a_choice_goes_on_from_the_given_beginning() -> None:
    sample = sample_of("C", prefix="The correct answer is (")
    assert METRICS["choice_strict"]("C) as told", sample) == 1.0
    assert METRICS["choice"](" ", sample) == 0.0


# --- needles


@pytest.mark.parametrize(
    "answer, score",
    [("12 345 and more", 1.0), ("\n 1 2345", 1.0), ("It is 12345", 0.0), ("1234", 0.0), (" ", 0.0)],
)
def test_prefix_by_hand(answer: str, score: float) -> None:
    assert METRICS["prefix"](answer, sample_of("123 45")) == score


def test_shares_of_right_answers_are_rulers() -> None:
    sample = sample_of("Apple", "pear", "PLUM", "fig")
    assert METRICS["all_in"]("apples, plum and FIG", sample) == 0.75
    assert METRICS["any_in"]("apples, plum and FIG", sample) == 1.0
    assert METRICS["all_in"]("nuts", sample) == METRICS["any_in"]("nuts", sample) == 0.0
    assert METRICS["all_in"]("nuts", sample_of()) == METRICS["any_in"]("nuts", sample_of()) == 0.0


# --- all

CLASSES_AND_LETTERS = sample_of("A", "Paragraph 3", "右", choices=("A", "Paragraph 3", ""))
TEXTS = st.one_of(
    st.text(max_size=80),
    st.text(alphabet="A(). \n\t#`/03。段落é", max_size=60),
    st.sampled_from(["", " ", "\n", "\0", "...", "\ud800", "a" * 3000, "9" * 5000, ". . ."]),
)


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=80, deadline=None)
@given(answer=TEXTS, right=TEXTS)
def test_any_answer_scores_between_0_and_1(metric: str, answer: str, right: str) -> None:
    for sample in (CLASSES_AND_LETTERS, sample_of(right), sample_of(right, choices=(right,))):
        score = METRICS[metric](answer, sample)
        assert isinstance(score, float)
        assert 0 <= score <= 1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("answer", ["", " ", "\n\t"])
def test_an_empty_answer_scores_0(metric: str, answer: str) -> None:
    for right in ("A", "", " "):
        assert METRICS[metric](answer, sample_of(right, choices=("A",))) == 0.0


@pytest.mark.parametrize("metric", METRICS)
def test_the_right_answer_scores_1(metric: str) -> None:
    right = {"retrieval": "Paragraph 4", "count": "4"}.get(metric, "B")
    answer = "The correct answer is (B)" if metric == "choice_strict" else right
    found = METRICS[metric](answer, sample_of(right, choices=(right, "C")))
    assert found == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    "metric, package", [("rouge_l_zh", "rouge"), ("edit_similarity", "rapidfuzz")]
)
def test_a_missing_package_is_named(
    metric: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
    with pytest.raises(ConfigError) as error:
        check_packages(["qa_f1", metric])
    assert str(error.value) == (
        f"{metric}: this metric needs the package {package}: pip install 'vllm-kvcompress[eval]'."
    )
    check_packages(["qa_f1", "choice", "continuation"])


def test_packages_are_named_for_every_metric_that_needs_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "rouge", None)
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    failing = Counter[str]()
    for name, metric in METRICS.items():
        try:
            metric("B", sample_of("B", choices=("B",)))
        except ConfigError:
            failing[name] += 1
    assert set(failing) == set(metrics._PACKAGES)

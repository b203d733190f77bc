"""The needle task makes the promised prompts, everywhere the same."""

import hashlib
import re

import pytest

from vllm_kvcompress.evaluation.tasks.needle import (
    STYLES,
    NeedleSample,
    is_right,
    make_samples,
    needle_token_span,
)

# Stands in for a real tokenizer: digits one by one, words and marks whole, a space joins what
# follows it, and one special token in front.
TOKEN = re.compile(r"\s?(?:[0-9]|[A-Za-z]+|[^A-Za-z0-9\s])|\s")


def offsets_of(text: str) -> list[tuple[int, int]]:
    return [(0, 0), *(match.span() for match in TOKEN.finditer(text))]


def tokenize(text: str) -> list[int]:
    return [0, *(1 + len(text[start:end]) for start, end in offsets_of(text)[1:])]


def filler_of(sample: NeedleSample) -> tuple[str, str]:
    introduction, text, question = sample.prompt.split("\n")
    before, after = text.split(sample.needle)
    return before, after


@pytest.mark.parametrize("num_tokens", [500, 1001, 2000, 4000])
def test_lengths_are_just_below_the_limit(num_tokens: int) -> None:
    for sample in make_samples(10, num_tokens, tokenize):
        assert sample.num_tokens == len(tokenize(sample.prompt))
        assert 0.99 * num_tokens <= sample.num_tokens <= num_tokens


@pytest.mark.parametrize("num_samples", [2, 5, 40])
def test_depths_are_even_and_true(num_samples: int) -> None:
    samples = make_samples(num_samples, 1000, tokenize)
    assert [sample.depth for sample in samples] == [
        index / (num_samples - 1) for index in range(num_samples)
    ]
    for sample in samples:
        before, after = filler_of(sample)
        assert len(before) / (len(before) + len(after)) == pytest.approx(sample.depth, abs=0.05)


def test_the_outermost_needles_touch_introduction_and_question() -> None:
    first, *_, last = make_samples(4, 600, tokenize)
    assert filler_of(first)[0] == ""
    assert filler_of(last)[1] == ""


def test_one_sample_lies_in_the_middle() -> None:
    (sample,) = make_samples(1, 600, tokenize)
    assert sample.depth == 0.5


def test_needle_and_answer_appear_once() -> None:
    for seed in range(3):
        for sample in make_samples(20, 800, tokenize, seed):
            assert sample.prompt.count(sample.needle) == 1
            assert sample.prompt.count(sample.answer) == 1
            assert sample.answer in sample.needle
            assert re.fullmatch(r"[1-9][0-9]{6}", sample.answer)
            assert len(set(sample.answer)) == 7


def test_prompt_has_the_agreed_form() -> None:
    for sample in make_samples(4, 600, tokenize):
        introduction, _, question = sample.prompt.split("\n")
        found = re.fullmatch(
            r"One of the special magic numbers for (\w+-\w+) is: \d{7}\.", sample.needle
        )
        assert found is not None
        key = found[1]
        assert introduction == (
            "Some special magic numbers are hidden within the following text. Make sure to "
            "memorize it. I will quiz you about the numbers afterwards."
        )
        assert question == (
            f"What is the special magic number for {key} mentioned in the provided text? The "
            f"special magic number for {key} mentioned in the provided text is"
        )


def test_styles_take_turns_and_differ() -> None:
    samples = make_samples(6, 1000, tokenize)
    assert [sample.style for sample in samples] == list(STYLES) * 3
    for sample in samples:
        sentences = re.findall(r"[^.]+\.", " ".join(filler_of(sample)))
        num_distinct = len({sentence.strip() for sentence in sentences})
        if sample.style == "noise":
            assert num_distinct == 5
        else:
            assert num_distinct > 0.8 * len(sentences)


def test_english_filler_has_no_open_brace() -> None:
    for sample in make_samples(6, 4000, tokenize):
        assert not set("{}") & set(sample.prompt)


def test_same_arguments_give_the_same_samples() -> None:
    samples = make_samples(6, 700, tokenize, seed=3)
    assert samples == make_samples(6, 700, tokenize, seed=3)
    other = make_samples(6, 700, tokenize, seed=4)
    assert all(a.answer != b.answer for a, b in zip(samples, other, strict=True))


def test_samples_are_the_same_on_every_machine() -> None:
    """Stored results hold for these prompts only: a new digest means new stored results."""
    text = "\n\n".join(sample.prompt for sample in make_samples(4, 700, tokenize))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "d8585b85ca3d43def888f13c86ed30ab89f1d1c561afeffa44f7cb1f3aacfa89"


def test_span_holds_exactly_the_needle() -> None:
    for sample in make_samples(9, 600, tokenize):
        offsets = offsets_of(sample.prompt)
        start, end = needle_token_span(sample.prompt, sample.needle, offsets)
        covered = sample.prompt[offsets[start][0] : offsets[end - 1][1]]
        assert covered.strip() == sample.needle
        assert start > 0  # the special token is counted


def test_span_takes_tokens_that_reach_over_the_edges() -> None:
    #                      <s>     "a b"   "cd e"  "f"     </s>
    assert needle_token_span("a bcd ef", "cd", [(0, 0), (0, 3), (3, 7), (7, 8), (8, 8)]) == (2, 3)
    assert needle_token_span("a bcd ef", "bcd", [(0, 0), (0, 3), (3, 7), (7, 8), (8, 8)]) == (1, 3)


def test_span_refuses_what_it_cannot_find() -> None:
    with pytest.raises(ValueError, match="exactly once in the prompt, found 0"):
        needle_token_span("some text", "other", [(0, 9)])
    with pytest.raises(ValueError, match="exactly once in the prompt, found 2"):
        needle_token_span("no no", "no", [(0, 5)])
    with pytest.raises(ValueError, match="exactly once in the prompt, found 0"):
        needle_token_span("some text", "", [(0, 9)])
    with pytest.raises(ValueError, match="do the offsets belong to this prompt"):
        needle_token_span("some text", "text", [(0, 4)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1000), "num_samples must be at least 1, got 0"),
        ((1, 0), "num_tokens must be at least 1, got 0"),
        ((1, 1000, -1), "seed must not be negative, got -1"),
        ((1, 30), r"num_tokens=30 is too short: .* one filler sentence has \d\d+ tokens"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[int, ...], message: str) -> None:
    num_samples, num_tokens, *seed = arguments
    with pytest.raises(ValueError, match=message):
        make_samples(num_samples, num_tokens, tokenize, *seed)


def test_shortest_possible_prompt_is_made() -> None:
    with pytest.raises(ValueError) as error:
        make_samples(1, 30, tokenize)
    found = re.search(r"has (\d+) tokens", str(error.value))
    assert found is not None
    shortest = int(found[1])
    (sample,) = make_samples(1, shortest, tokenize)
    assert sample.num_tokens == shortest


def test_a_tokenizer_that_never_grows_does_not_hang() -> None:
    (sample,) = make_samples(1, 20, lambda text: [0])
    assert sample.num_tokens == 1


def test_right_answers() -> None:
    assert is_right(" 1234567", "1234567")
    assert is_right("12 345\n67. And", "1234567")
    assert not is_right(" 1234576", "1234567")
    assert not is_right("it is 1234567", "1234567")
    assert not is_right("", "1234567")

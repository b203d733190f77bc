"""Generated tasks: answers are in the text, once, where they should be, and lengths hold."""

import re
from collections import Counter

import pytest
from transformers import AutoTokenizer

from vllm_kvcompress.evaluation.quality.filler import as_many_as_fit, spread
from vllm_kvcompress.evaluation.quality.generated import (
    COMMON_WORDS,
    FAMILIES,
    NUM_FREQUENT,
    generated_sample,
)
from vllm_kvcompress.evaluation.quality.prompts import Prompter
from vllm_kvcompress.evaluation.quality.sample import Sample
from vllm_kvcompress.evaluation.quality.words import (
    FEWEST_WORDS,
    chance,
    pick_many,
    shuffled,
    words_of,
)


@pytest.fixture(scope="module")
def prompter(probe_model: str) -> Prompter:
    return Prompter(AutoTokenizer.from_pretrained(probe_model))


def make(prompter: Prompter, family: str, length: int = 1500, index: int = 0, seed: int = 0):
    given = family, length, index, 5, seed
    return generated_sample(*given, prompter.words, prompter.count, prompter.tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [800, 2000])
def test_a_prompt_fits_and_is_nearly_full(prompter: Prompter, family: str, length: int) -> None:
    for index in range(6):
        sample = make(prompter, family, length, index)
        found = len(prompter.of(sample).token_ids)
        assert length - 80 < found <= length
        assert sample.length == length and sample.metric == "all_in" and sample.answers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_and_another_one_others(prompter, family: str) -> None:
    first, again = make(prompter, family, 900), make(prompter, family, 900)
    assert first == again
    assert make(prompter, family, 900, seed=1).answers != first.answers
    assert make(prompter, family, 900, index=1).answers != first.answers


@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_room_for_the_answer(prompter: Prompter, family: str) -> None:
    sample = make(prompter, family, 900)
    assert prompter.tokens(" " + ", ".join(sample.answers)) <= sample.max_tokens


@pytest.mark.parametrize("family", ["niah_single", "ruler_multikey", "ruler_lines"])
def test_one_needle_is_at_its_depth(prompter: Prompter, family: str) -> None:
    for index in range(10):
        sample = make(prompter, family, 1200, index)
        (code,) = sample.answers
        assert sample.context.count(code) == 1 and code not in sample.question
        assert sample.depth == index % 5 / 4
        place = sample.context.index(code) / len(sample.context)
        assert abs(place - sample.depth) < 0.12


def test_distractors_have_other_codes(prompter: Prompter) -> None:
    sample = make(prompter, "ruler_multikey")
    codes = re.findall(r"secret code of (\w+) is (\d{7})", sample.context)
    assert len(codes) == len(dict(codes)) == 4
    key = re.search(r"secret code of (\w+)\?", sample.question)
    assert key and dict(codes)[key[1]] == sample.answers[0]


def test_lines_hold_nothing_but_needles(prompter: Prompter) -> None:
    sample = make(prompter, "ruler_lines")
    lines = sample.context.partition("\n\n")[2].split("\n")
    codes = dict(
        re.fullmatch(r"The secret code of (\w+) is (\d{7})\.", line).groups() for line in lines
    )
    assert len(codes) == len(lines) > 20


def test_all_values_and_all_queries_are_there(prompter: Prompter) -> None:
    sample = make(prompter, "ruler_multivalue")
    assert len(set(sample.answers)) == 4
    assert all(sample.context.count(code) == 1 for code in sample.answers)
    sample = make(prompter, "ruler_multiquery")
    asked = (
        re.search(r"secret codes of (.*)\?", sample.question)[1].replace(" and ", ", ").split(", ")
    )
    codes = dict(re.findall(r"secret code of (\w+) is (\d{7})", sample.context))
    assert [codes[key] for key in asked] == list(sample.answers)


def test_variables_lead_to_the_value(prompter: Prompter) -> None:
    sample = make(prompter, "ruler_vt")
    text = sample.context.partition("Text: ")[2]
    values: dict[str, str] = {}
    for name, source in re.findall(r"Set (\w+) = (\w+)\.", text):
        values[name] = values.get(source, source)
    value = re.search(r"value (\d+)\?", sample.question)[1]
    assert [name for name, found in values.items() if found == value] == list(sample.answers)
    assert len(sample.answers) == 5


def test_two_facts_lead_to_the_mayor(prompter: Prompter) -> None:
    sample = make(prompter, "ruler_qa")
    towns = dict(re.findall(r"(\w+ \w+) lives in the town of (\w+)\.", sample.context))
    mayors = dict(re.findall(r"The mayor of (\w+) is (\w+ \w+)\.", sample.context))
    who = re.search(r"where (\w+ \w+) lives", sample.question)[1]
    assert (mayors[towns[who]],) == sample.answers


def test_common_words_are_the_most_common(prompter: Prompter) -> None:
    for length in (700, 4000):
        sample = make(prompter, "ruler_cwe", length)
        listed = re.findall(r"\d+\. (\w+)", sample.context)
        most = Counter(listed).most_common(COMMON_WORDS + 1)
        assert {word for word, _ in most[:COMMON_WORDS]} == set(sample.answers)
        assert most[COMMON_WORDS - 1][1] > most[COMMON_WORDS][1], "no tie at the edge"


def test_frequent_words_are_the_most_frequent(prompter: Prompter) -> None:
    for index in range(4):
        sample = make(prompter, "ruler_fwe", 1000, index)
        counts = Counter(re.findall(r"[a-z]{6}", sample.context.partition("\n\n")[2]))
        most = counts.most_common(NUM_FREQUENT + 1)
        assert [word for word, _ in most[:NUM_FREQUENT]] == list(sample.answers)
        times = [count for _, count in most]
        assert sorted(set(times), reverse=True) == times, "no ties"


def test_a_prompt_without_room_is_refused(prompter: Prompter) -> None:
    with pytest.raises(ValueError, match="the shortest prompt has"):
        make(prompter, "ruler_multiquery", 64)


def test_hidden_and_visible_prompts_are_one(prompter: Prompter) -> None:
    """The text is a prefix of the prompt; the question is not in it."""
    sample = make(prompter, "niah_single")
    prompt = prompter.of(sample)
    assert prompt.token_ids == prompt.context + prompt.rest
    assert sample.question.strip()[:20] in prompter.text(prompt.rest)
    assert sample.question.strip() not in prompter.text(prompt.context)


class Templated:
    """A tokenizer with a chat template, one token per character."""

    chat_template = "yes"
    bos_token_id = 1

    def apply_chat_template(self, messages, tokenize, add_generation_prompt) -> str:
        assert not tokenize and add_generation_prompt
        return f"<user>{messages[0]['content'].strip()}</user><bot>"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


def test_the_template_is_around_text_and_question() -> None:
    sample = Sample("1", "t", " long text ", "\nWhy?", ("x",), "all_in", 4, "Because")
    prompt = Prompter(Templated()).of(sample)
    assert "".join(map(chr, prompt.context)) == "<user>long text"
    assert "".join(map(chr, prompt.rest)) == "\nWhy?</user><bot>Because"
    plain = Prompter(Templated(), use_template=False).of(sample)
    assert plain.context[0] == 1 and "".join(map(chr, plain.context[1:])) == "long text"
    assert "".join(map(chr, plain.rest)) == "\nWhy?\nBecause"


def test_a_foreign_text_that_is_too_long_loses_its_middle(prompter: Prompter) -> None:
    text = " ".join(prompter.words[:300])
    sample = Sample("1", "qa", text, "\nWhy?", ("x",), "all_in", 4)
    whole = prompter.of(sample)
    cut = prompter.of(sample, len(whole.token_ids) - 100)
    assert len(cut.token_ids) + 4 == len(whole.token_ids) - 100
    assert cut.rest == whole.rest
    assert cut.context[:50] == whole.context[:50] and cut.context[-50:] == whole.context[-50:]


# --- words and filler ---------------------------------------------------------------------


class TinyTokenizer:
    """A vocabulary without words."""

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "B": 1}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def test_words_are_made_up_where_the_vocabulary_has_none() -> None:
    words = words_of(TinyTokenizer())
    assert len(words) == FEWEST_WORDS == len(set(words)) and words == sorted(words)


def test_chance_depends_on_its_parts_alone() -> None:
    assert chance(1, "a").random() == chance(1, "a").random() != chance(1, "b").random()
    items = list(range(50))
    assert sorted(shuffled(chance(0), items)) == items != shuffled(chance(0), items)
    assert len(set(pick_many(chance(0), items, 20))) == 20
    with pytest.raises(ValueError, match="51 of 50"):
        pick_many(chance(0), items, 51)


def test_as_many_as_fit_takes_the_most() -> None:
    def endless():
        while True:
            yield "x"

    for limit in (3, 64, 65, 200):
        items = as_many_as_fit(endless(), limit, lambda each: len(each) + 3)
        assert len(items) == limit - 3


def test_inserts_keep_their_order_at_equal_places() -> None:
    assert spread(["a", "b"], ["1", "2"], [1.0, 1.0]) == ["a", "b", "1", "2"]
    assert spread(["a", "b"], ["1", "2"], [0.5, 0.0]) == ["2", "a", "1", "b"]
    assert spread([], ["1"], [0.7]) == ["1"]

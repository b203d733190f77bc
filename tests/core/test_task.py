"""Which ends of a prompt the classifier sees, and where it is not asked at all."""

from types import SimpleNamespace

import pytest

from vllm_kvcompress.core import task
from vllm_kvcompress.core.classifier import head_and_tail
from vllm_kvcompress.core.task import RequestClassifier

QUESTION = "Answer the question based on the passage.\n\n"
SUMMARY = "Write a one-page summary of the report.\n\n"


@pytest.fixture()
def loads(monkeypatch) -> list[object]:
    """A tokenizer with one token per character; every load of it is noted."""
    found: list[object] = []

    def load(model_config):
        found.append(model_config)
        return SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))

    monkeypatch.setattr(task, "cached_tokenizer_from_config", load)
    return found


def request(text: str | None) -> SimpleNamespace:
    ids = None if text is None else [ord(c) for c in text]
    return SimpleNamespace(prompt_token_ids=ids, mm_features=[])


def test_the_two_classes_one_after_the_other(loads) -> None:
    """A rival's first request decided for all that followed."""
    model = SimpleNamespace(skip_tokenizer_init=False)
    classifier = RequestClassifier(model)
    passage = "The tower was built by a mason from the next valley. " * 40
    asked = QUESTION + passage + "\n\nQuestion: Who built the tower?\nAnswer:"
    told = SUMMARY + passage + "\n\nSummary:"
    found = [classifier.classify(request(text)) for text in (asked, told, told, asked)]
    assert found == ["localization", "aggregation", "aggregation", "localization"]
    assert loads == [model], "the tokenizer is loaded once"


def test_images_do_not_hide_what_is_asked(loads) -> None:
    """An image at either end is more tokens than the classifier looks at."""
    asked = request(SUMMARY + "The tower was built by a mason. " * 40 + "\n\nSummary:")
    size, given = 300, asked.prompt_token_ids
    asked.prompt_token_ids = [0] * size + given + [0] * size
    asked.mm_features = [
        SimpleNamespace(mm_position=SimpleNamespace(offset=offset, length=size))
        for offset in (0, size + len(given))
    ]
    classifier = RequestClassifier(SimpleNamespace(skip_tokenizer_init=False))
    assert classifier.classify(asked) == "aggregation"
    assert task._text_of(asked) == given


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([], "abcdefgh"),
        ([(0, 2)], "cdefgh"),
        ([(3, 2)], "abcfgh"),
        ([(1, 2), (4, 1), (7, 1)], "adfg"),
        ([(0, 8)], ""),
    ],
)
def test_text_before_between_and_behind_images(
    places: list[tuple[int, int]], expected: str
) -> None:
    asked = request("abcdefgh")
    asked.mm_features = [
        SimpleNamespace(mm_position=SimpleNamespace(offset=offset, length=length))
        for offset, length in places
    ]
    assert "".join(map(chr, task._text_of(asked))) == expected


def test_where_there_is_no_text_nobody_is_asked(loads) -> None:
    with_tokenizer = RequestClassifier(SimpleNamespace(skip_tokenizer_init=False))
    assert with_tokenizer.classify(request(None)) is None
    without = RequestClassifier(SimpleNamespace(skip_tokenizer_init=True))
    assert without.classify(request(SUMMARY)) is None
    assert not loads


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 511, 512, 513, 5000])
def test_ends_do_not_overlap(length: int) -> None:
    ids = list(range(length))
    head, tail = head_and_tail(ids)
    assert len(head) <= 256 and len(tail) <= 256
    assert tail == ids[len(ids) - len(tail) :] and head == ids[: len(head)]
    assert len(head) + len(tail) == min(length, 512)

"""The user's texts become samples that lie apart, are spread evenly and join without a seam."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality.own_text import text_samples
from vllm_kvcompress.evaluation.quality.sample import Sample


def encode_bytes(text: str) -> list[int]:
    return list(text.encode("utf-8"))


def decode_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


class Words:
    """A tokenizer of whole words that drops the space at a text's beginning, as many do."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text: str) -> list[int]:
        first = len(self.words)
        self.words += text.split()
        return list(range(first, len(self.words)))

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[index] for index in ids)


def cut(
    paths: list[Path],
    length: int,
    continuation: int,
    count: int,
    seed: int = 0,
    encode: Callable[[str], list[int]] = encode_bytes,
    decode: Callable[[list[int]], str] = decode_bytes,
) -> list[Sample]:
    return text_samples(paths, encode, decode, length, continuation, count, seed)


def sentence(paths: list[Path], length: int = 1, continuation: int = 1, count: int = 1) -> str:
    with pytest.raises(ConfigError) as error:
        cut(paths, length, continuation, count)
    found = str(error.value)
    assert "\n" not in found and found.endswith(".")
    return found


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def numbers(count: int) -> str:
    """Eight bytes each: a text in which every place tells where it is."""
    return "".join(f"{index:07d} " for index in range(count))


def test_what_a_sample_holds(tmp_path: Path) -> None:
    path = write(tmp_path / "notes.txt", numbers(4))
    first, second = cut([path], length=12, continuation=4, count=2)
    assert first == Sample(
        name="notes.txt@0",
        task="text",
        context="0000000 0000",
        question="",
        answers=(),
        metric="continuation",
        max_tokens=4,
        continuation="001 ",
        length=12,
    )
    assert (second.name, second.context) == ("notes.txt@16", "0000002 0000")
    assert second.continuation == "003 "


def test_samples_are_spread_over_the_whole_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.md", numbers(1000))  # 8000 tokens
    samples = cut([path], length=90, continuation=10, count=8)
    starts = [int(sample.name.split("@")[1]) for sample in samples]
    gaps = [after - before for before, after in zip(starts, starts[1:], strict=False)]
    assert min(gaps) == max(gaps) == 1000
    others = {cut([path], 90, 10, 8, seed)[0].name for seed in range(20)}
    assert len(others) > 5  # the seed moves the spread
    assert cut([path], 90, 10, 8) == samples


def test_texts_get_samples_by_their_length(tmp_path: Path) -> None:
    long, short = write(tmp_path / "l.txt", numbers(300)), write(tmp_path / "s.txt", numbers(100))
    samples = cut([long, short], length=15, continuation=5, count=8)
    sources = [sample.name.split("@")[0] for sample in samples]
    assert sources == ["l.txt"] * 6 + ["s.txt"] * 2


def test_lines_of_a_jsonl_file_are_texts_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"text": "a" * 20}, {"prompt": "b" * 9}, {"prompt": "x", "text": "c\u2028" + "c" * 20}]
    text = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write(path, text)
    samples = cut([path], length=6, continuation=4, count=4)
    assert [sample.name for sample in samples] == [
        "prompts.jsonl:1@0",
        "prompts.jsonl:1@10",
        "prompts.jsonl:5@0",
        "prompts.jsonl:5@14",
    ]
    assert samples[2].context == "c\u2028cc"  # the mark has three bytes
    assert {sample.continuation for sample in samples} == {"aaaa", "cccc"}


def test_a_place_alone_lies_in_the_middle(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "0123456789abcdefghi")
    (sample,) = cut([path], length=8, continuation=4, count=1)
    assert (sample.context, sample.continuation) == ("3456789a", "bcde")


def test_files_of_one_name_keep_their_folders(tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder / "x.txt", numbers(2)))
    names = [sample.name for sample in cut(paths, 12, 4, 2)]
    assert names == [f"{path}@0" for path in paths]


def test_a_dropped_space_goes_into_the_continuation(tmp_path: Path) -> None:
    path, words = write(tmp_path / "a.txt", "one two three four five six"), Words()
    samples = cut([path], 2, 1, 2, encode=words.encode, decode=words.decode)
    assert [(each.context, each.continuation) for each in samples] == [
        ("one two", " three"),
        ("four five", " six"),
    ]


def test_a_decoder_that_tidies_up_is_taken_at_its_word(tmp_path: Path) -> None:
    def decode(ids: list[int]) -> str:
        return decode_bytes(ids).strip().capitalize()

    path = write(tmp_path / "a.txt", "ab cd ef")
    (sample,) = cut([path], 5, 3, 1, decode=lambda ids: decode(ids)[::-1])
    assert (sample.context, sample.continuation) == ("dc bA", "fE")


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="aé€😀\n", min_size=1, max_size=60), min_size=1, max_size=3),
    length=st.integers(8, 20),
    continuation=st.integers(8, 12),
    count=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_samples_are_pieces_that_do_not_overlap(
    texts: list[str],
    length: int,
    continuation: int,
    count: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    texts = [text for text in texts if text.strip()] or ["a"]
    paths = [write(folder / f"{index}.txt", text) for index, text in enumerate(texts)]
    fit = sum(len(encode_bytes(text)) // (length + continuation) for text in texts)
    if fit < count:
        assert f"hold {fit} of {count} samples" in sentence(paths, length, continuation, count)
        return
    samples = cut(paths, length, continuation, count, seed)
    assert len({sample.name for sample in samples}) == count
    ends = {path.name: 0 for path in paths}
    for sample in samples:
        name, start = sample.name.split("@")
        whole = sample.context + sample.continuation
        assert whole in texts[int(name.split(".")[0])]
        assert abs(len(encode_bytes(sample.context)) - length) <= 6
        assert abs(len(encode_bytes(sample.continuation)) - continuation) <= 6
        assert len(encode_bytes(whole)) <= length + continuation
        assert int(start) >= ends[name]
        ends[name] = int(start) + length + continuation


def test_too_short_files_say_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # long paths would be shortened
    paths = [write(Path(f"{name}.txt"), "x" * 50) for name in "ab"]
    assert sentence(paths, 20, 10, 3) == (
        "a.txt, b.txt: too short: 100 tokens hold 2 of 3 samples; needed are 90 tokens, "
        "in texts of at least 20 + 10 each."
    )


@pytest.mark.parametrize(
    "name, content, fault",
    [
        ("a.txt", b"", ": the file is empty"),
        ("a.txt", b" \n\t", ": the file is empty"),
        ("a.txt", b"\xef\xbb\xbf", ": the file is empty"),
        ("a.txt", b"text \xff\xfe", ": this is not UTF-8 text (byte 0xff at 5)"),
        ("a.txt", "text".encode("utf-16"), ": this is not UTF-8 text (byte 0xff at 0)"),
        ("a.bin", b"\x7fELF\0\0\0", ": this is no text file: it holds zero bytes"),
        ("a.jsonl", b"", ": the file is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', ":2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\xff', ":2: this is not UTF-8 text (byte 0xff at 0)"),
        ("a.jsonl", b'"x"', ":1: allowed is an object with a field text or prompt, got 'x'"),
        ("a.jsonl", b'{"txt": "x"}', ":1: allowed is an object with a field text or prompt"),
        ("a.jsonl", b'{"text": 3}', ":1: text: allowed is a text, got 3"),
        ("a.jsonl", b'{"prompt": " "}', ":1: prompt: the text is empty"),
        ("a.jsonl", b'{"text": "\\ud83d"}', ":1: text: the text holds half a character"),
    ],
)
def test_files_that_are_no_texts(name: str, content: bytes, fault: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert sentence([path]).startswith(f"{path}{fault}")


def test_files_that_are_not_there_or_given_twice(tmp_path: Path) -> None:
    missing, text = tmp_path / "missing.txt", write(tmp_path / "a.txt", "text")
    assert sentence([missing]) == f"{missing}: cannot be read (No such file or directory)."
    assert sentence([missing.with_suffix(".jsonl")]).endswith("(No such file or directory).")
    assert sentence([tmp_path]) == f"{tmp_path}: cannot be read (Is a directory)."
    assert sentence([text, text]) == f"{text}: this file is given twice."
    assert sentence([]) == "No text file was given."

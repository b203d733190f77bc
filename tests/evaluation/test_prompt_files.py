"""Files of prompts with odd content: read as they are, or refused in one sentence with the line."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation import prompt_files
from vllm_kvcompress.evaluation.quality.records import RUN, RecordFolder
from vllm_kvcompress.evaluation.text_files import read_text
from vllm_kvcompress.evaluation.tuning.prompts_file import read_prompts as read_own


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer: code points."""
    monkeypatch.setattr(
        prompt_files, "_tokenizer", lambda model: lambda text: [ord(each) for each in text]
    )


def read(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return ["".join(map(chr, each)) for each in prompt_files.read_prompts(path, path, None, None)]


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    """JSON may hold Unicode's line separators as they are; form feeds stand in plain texts."""
    odd = "a\u2028b\x85c\x1ed"
    lines = [json.dumps(odd, ensure_ascii=False), json.dumps({"prompt": "x"})]
    assert read(tmp_path / "p.jsonl", "\n".join(lines).encode()) == [odd, "x"]
    assert read(tmp_path / "p.txt", b"\xef\xbb\xbfone\x0ctwo\r\n\r\nthree\n") == [
        "one\x0ctwo",
        "three",
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        pytest.param(b"[" * 100_000, "not valid JSON", marks=pytest.mark.deep),
        (b"9" * 5000, "not valid JSON"),
        (b"\xff", "not UTF-8 text"),
        (b'"\\ud800"', "half a character"),
        (b'{"prompt": "a\\udfff"}', "half a character"),
        (b"true", "holds no prompt"),
        (b"[true]", "holds no prompt"),
        (b"1e999", "holds no prompt"),
        (b'" "', "the text is empty"),
        (b'{"prompt": ' + b'"\\u001b[2J' + b"x" * 10**6 + b"}", "not valid JSON"),
    ],
)
def test_a_bad_line_is_one_sentence(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "p.jsonl"
    with pytest.raises(ConfigError, match=words) as caught:
        read(path, b'"good"\n' + line)
    path.write_bytes(b'{"prompt": "good"}\n' + line)
    with pytest.raises(ConfigError) as caught_by_tune:
        read_own(path, False, 9)
    for message in (str(caught.value), str(caught_by_tune.value)):
        assert len(message) <= 400 and message.isprintable() and message.endswith(".")
        assert f"{path}:2" in message


@pytest.mark.parametrize("kind", ["directory", "looping", "dangling"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "p.txt"
    if kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "looping" else tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_text(path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        pytest.param("[" * 100_000, marks=pytest.mark.deep),
        "[1]",
        '{"asked": 1}',
        "{",
        '{"x": 1}',
    ],
    ids=["empty", "deep", "list", "number", "cut", "other"],
)
def test_a_folder_of_somebody_elses(tmp_path: Path, content: str) -> None:
    (tmp_path / RUN).write_text(content)
    asked: dict[str, Any] = {"model": "m"}
    with pytest.raises(ConfigError, match="is no file of kvcompress eval"):
        RecordFolder(tmp_path).start(asked, {})

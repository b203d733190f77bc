"""The script that measures prompts which are compacted inside."""

from pathlib import Path

import pytest

from lab import prompt_marks
from lab.prompt_marks import END, Setting, read


def command(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr("sys.argv", ["prompt_marks.py", *options])
    return prompt_marks.main()


def test_answers_are_counted_and_not_measured_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.csv"
    options = ["run", "--out", str(out), "--lengths", "600", "--num-samples", "2"]
    options += ["--policies", "streaming_llm", "--intervals", "128"]
    assert command(monkeypatch, *options) == 0
    first = read(out)
    assert [(row["policy"], row["interval"]) for row in first] == 2 * [
        ("none", END), ("streaming_llm", END), ("streaming_llm", "128"),
    ]  # fmt: skip
    assert [row["depth"] for row in first[::3]] == ["0.0000", "1.0000"]
    assert all(row["right"] == "1" for row in first if row["policy"] == "none")
    assert command(monkeypatch, *options, "--policies", "streaming_llm", "keydiff") == 0
    again = read(out)
    assert again[:6] == first and len(again) == 10
    capsys.readouterr()
    assert command(monkeypatch, "show", "--out", str(out)) == 0
    shown = capsys.readouterr().out
    assert "whole cache 2 of 2 (34-100)" in shown
    assert "| policy | at the end | every 128 |" in shown
    # Marks at 88, which is 72 in whole blocks, at 216, 344, 472, and the end.
    assert "| most tokens held | 600 | 216 |" in shown


def test_settings_differ_in_their_trigger_alone() -> None:
    inside, end = Setting("windowkv", 0.12, "512").config, Setting("windowkv", 0.12, END).config
    assert inside is not None and end is not None
    assert (inside.trigger, inside.prompt_interval, end.trigger) == ("prompt", 512, "end_of_prompt")
    same = {"trigger": end.trigger, "prompt_interval": end.prompt_interval}
    assert {**inside.to_dict(), **same} == end.to_dict()
    assert inside.policy.params["window_score"] == "mean", "the task of one number"

"""Files and flags as the user gives them: every way to be wrong is one sentence with a place."""

import time
from pathlib import Path
from typing import Any

import pytest

from vllm_kvcompress.config.reading import parse_config, parse_json
from vllm_kvcompress.config.yaml_reader import MAX_BYTES
from vllm_kvcompress.errors import MAX_LENGTH, ConfigError

FIELDS = "policy: {name: snapkv}\nbudget: {ratio: 0.1}\n"


def refusal(setting: Any, overrides: Any = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(setting, overrides)
    message = str(caught.value)
    assert len(message) <= MAX_LENGTH and message.isprintable() and message.endswith(".")
    return message


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("x.yaml")


# --- names of files -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("~no_such_user/x.yaml", "no home directory for ~no_such_user/x.yaml"),
        ("a" * 300 + ".yaml", "name too long"),
        ("d/" + "a" * 70_000, "name too long"),
        ("a\0b.yaml", "'a\\x00b.yaml' cannot be the name of a file"),
        ("\udcff/x.yaml", "there is no file"),
        ("\ud800/x.yaml", "cannot be the name of a file"),
        ("dir.yaml", "dir.yaml is a directory"),
        ("./dir.yaml", "./dir.yaml is a directory"),
        ("dir.yaml/", "is a directory"),
        ("x.yaml/y.yaml", "there is no file x.yaml/y.yaml"),
        ("/dev/zero", "/dev/zero is no regular file"),
        ("loop.yaml", "cannot be read"),
        ("", "there is no preset ''"),
        ("p" * 100_000, "allowed are none, adakv"),
        ("a\nb", "there is no preset 'a\\nb'"),
    ],
)
def test_a_name_that_leads_nowhere(file: Path, name: str, words: str) -> None:
    file.write_text(FIELDS)
    Path("dir.yaml").mkdir()
    Path("loop.yaml").symlink_to("loop.yaml")
    message = refusal(name)
    assert message.startswith("--kv-compression: ") and words.lower() in message.lower()
    if "\ud800" <= name[:1] <= "\udfff":
        return  # a mapping refuses it as text already
    assert refusal({"preset": name}) == message


def test_a_pipe_is_not_waited_for(file: Path) -> None:
    import os

    os.mkfifo(file)
    assert "x.yaml is no regular file" in refusal("x.yaml")


def test_a_file_that_may_not_be_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(FIELDS)

    def refuse(*args: Any) -> None:  # root may read everything, so permissions prove nothing
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert refusal("x.yaml") == "--kv-compression: x.yaml cannot be read: Permission denied."


# --- contents -----------------------------------------------------------------------------

NESTED = "[" * 5000 + "]" * 5000
ANCHORS = "abcdefghi"


def bomb(link: str) -> str:
    """Nine levels, each nine times the one before; `link` says how a level refers to the last."""
    lines = [f"a: &a {{x: &x {FIELDS.count(' ')}}}"]
    for last, name in zip(ANCHORS, ANCHORS[1:], strict=False):
        lines.append(f"{name}: &{name} " + link.replace("ALL", ", ".join([f"*{last}"] * 9)))
    return "\n".join([*lines, "policy: *i", ""])


WRONG = [
    ("", "mapping of fields to values, and it is empty"),
    ("# nothing\n", "and it is empty"),
    ("- 3\n", "mapping of fields to values, got [3]"),
    ("hello\n", "got 'hello'"),
    ("policy: [\n", "not valid YAML: line 2, column 1: "),
    ("policy: {name: snapkv}\n\tx: 1\n", "not valid YAML: line 2"),
    ("policy: a\n---\npolicy: b\n", "line 2, column 1: expected a single document"),
    ("policy: a\0b\n", "line 1: the character 0x0 is not allowed"),
    ('policy: "\\UFFFFFFFF"\n', "an escape stands for no character"),
    ('policy: "\\ud800"\n', "policy: not valid Unicode"),
    ("%YAML 9.9\n---\na: 1\n", "not valid YAML"),
    (b"policy: \xff\n", "cannot be decoded as UTF-8 text: byte 9 is 0xff"),
    (FIELDS.encode("utf-16"), "cannot be decoded as UTF-8"),
    # names of fields
    (FIELDS + "1: 2\n", "names of fields must be text, got 1 in line 3"),
    (FIELDS + "true: 2\n", "names of fields must be text, got true in line 3"),
    (FIELDS + "? \n: 2\n", "names of fields must be text"),
    (FIELDS + "? [a, b]\n: 2\n", "names of fields must be text"),
    (FIELDS + "? &a [*a]\n: 2\n", "names of fields must be text"),
    (FIELDS + "? " * 4000, "names of fields must be text"),
    ("policy: {name: snapkv, 1: 2}\n", "policy: names of fields must be text, got 1 in line 1"),
    ("policy: {scorer: {~: 2}}\n", "policy.scorer: names of fields must be text, got ~"),
    # given twice
    (FIELDS + FIELDS, "policy: this field is given twice, in lines 1 and 3"),
    ("a: 1\n'a': 2\n", "a: this field is given twice, in lines 1 and 2"),
    ("budget:\n  ratio: 0.1\n  ratio: 0.2\n", "budget.ratio: this field is given twice, in lines"),
    ("pinned:\n- {a: 1,\n   a: 2}\n", "pinned.0.a: this field is given twice, in lines 2 and 3"),
    ("tasks: {localization: {policy: {a: 1, a: 1}}}", "tasks.localization.policy.a: this field"),
    ("a: &a {x: 1, x: 2}\nb: {<<: *a}\n", "a.x: this field is given twice"),
    # aliases and depth
    (f"policy: {NESTED}", "policy.0.0: fields and lists can be nested 16 deep"),
    ("{a: " * 3000, "a.a.a: fields and lists can be nested 16 deep"),
    ("a: &a [*a]\n", "a.0: this alias contains itself, got *a"),
    ("a: &a {b: *a}\n", "a.b: this alias contains itself"),
    ("a: &a {<<: *a}\n", "this alias contains itself"),
    ("a: *nowhere\n", "not valid YAML: line 1, column 4: found undefined alias 'nowhere'"),
    (bomb("[ALL]"), "more than 50000 values"),
    (bomb("{<<: [ALL]}"), "more than 50000 values"),
    ("a: &a [" + "1," * 1000 + "]\npolicy: [" + "*a," * 30 + "]\n", "policy: more than 20000"),
    (
        "a: &a {b: [1]}\n" + "".join(f"a{i}: &a{i} [*a{i - 1 or ''}]\n" for i in range(1, 40)),
        "nested 16 deep",
    ),
    # values
    (
        "policy: !!python/object/apply:os.system ['false']\n",
        "policy: the tag !!python/object/apply",
    ),
    ("policy: {name: !!str 3}\n", "policy.name: the tag !!str is not allowed"),
    ("policy: !mine 3\n", "policy: the tag !mine is not allowed"),
    ("!!set {a, b}\n", "the tag !!set is not allowed"),
    ("budget: {ratio: 2024-01-01}\npolicy: {name: x}\n", "ratio: input should be a valid number"),
    ("budget: {ratio: 2024-99-99}\npolicy: {name: x}\n", "got '2024-99-99'"),
    ("budget: {ratio: .nan}\n", "budget.ratio: must be a finite number, got nan"),
    ("budget: {ratio: 1e999}\n", "budget.ratio: must be a finite number, got inf"),
    ("budget: {tokens: " + "1" * 401 + "}\n", "budget.tokens: must be a number below 2**63"),
    ("budget: {tokens: " + "1" * 5000 + "}\n", "line 1, column 18: this number cannot be read"),
    ("budget: {tokens: 0x_}\n", "line 1, column 18: this number cannot be read"),
    (FIELDS + "z" * 1000 + ": 1\n", ": unknown field; allowed are budget"),
    (FIELDS + '"a\\nb": 1\n', "a\\nb: unknown field"),
    (FIELDS + '"tuple[": 1\n', "tuple[: unknown field"),
]


@pytest.mark.parametrize(("text", "words"), WRONG, ids=[str(words)[:50] for _, words in WRONG])
def test_wrong_contents_are_one_sentence(file: Path, text: str | bytes, words: str) -> None:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    started = time.process_time()
    message = refusal("x.yaml")
    assert time.process_time() - started < 10
    assert message.startswith("x.yaml: ") and words in message


def test_a_file_that_is_too_large_is_not_parsed(file: Path) -> None:
    file.write_text(FIELDS + "#" * MAX_BYTES)
    assert refusal("x.yaml") == "x.yaml: the file is larger than 256 KiB."


def test_a_long_path_is_cut_and_the_rule_is_not(file: Path) -> None:
    name = "/".join(["d" * 200] * 10) + "/x.yaml"
    Path(name).parent.mkdir(parents=True)
    Path(name).write_text(FIELDS + "z" * 300 + ": 1\n")
    message = refusal(name)
    assert message.startswith("dddd") and "x.yaml: zzz" in message
    assert "unknown field; allowed are budget, codebook" in message
    assert message.endswith("trigger, version.")


def test_aliases_merge_keys_and_exponents_work(file: Path) -> None:
    file.write_text(
        "policy: {name: cake, gamma: 1e2}\n"
        "budget: &few {ratio: 0.5, floor: 8}\n"
        "draft: {budget: {<<: *few, ratio: 1e-1}}\n"
        "pinned: [&pin [0, 5], *pin]\n"
    )
    config = parse_config("x.yaml")
    assert config.policy.params == {"gamma": 100.0}
    assert (config.draft.budget.ratio, config.draft.budget.floor) == (0.1, 8)
    assert config.pinned == ([0, 5], [0, 5])
    file.write_text("\ufeff" + FIELDS)
    assert parse_config("x.yaml") is not None, "Windows editors begin files with a mark"


# --- --kv-compression-config --------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ("null", "expected a JSON object of fields, got None"),
        pytest.param('{"a":' * 100_000, "nested too deep", marks=pytest.mark.deep),
        ('{"a":' * 90 + "1" + "}" * 90, "a.a.a: fields and lists can be nested 16 deep"),
        ('{"interval": 1, "interval": 2}', "interval: this field is given twice"),
        ('{"budget": {"a": 1, "a": 1}}', "a: this field is given twice"),
        ('{"interval": ' + "1" * 5000 + "}", "a number is too long"),
        ('{"interval": ' + "1" * 400 + "}", "interval: must be a number below 2**63"),
        ('{"budget": {"ratio": NaN}}', "budget.ratio: must be a finite number, got nan"),
        ('{"budget": {"ratio": 1e999}}', "budget.ratio: must be a finite number, got inf"),
        ('{"trigger": "\\ud800"}', "trigger: not valid Unicode"),
        ("[" + "1," * 100_000 + "1]", "expected a JSON object of fields, got [1, 1"),
        ('{"a": [' + "1," * 100_000 + "1]}", "a: more than 20000 values"),
    ],
)
def test_wrong_json_is_one_sentence(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_json(text)
    message = str(caught.value)
    assert message.startswith("--kv-compression-config: ") and words in message
    assert len(message) <= MAX_LENGTH and message.isprintable()

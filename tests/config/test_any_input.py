"""Whatever is given, a setting comes out or one sentence; hypothesis makes up the input."""

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.config import reading as config_module
from vllm_kvcompress.config import yaml_reader
from vllm_kvcompress.config.reading import parse_config, parse_json, preset_names
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.config.yaml_reader import parse_yaml
from vllm_kvcompress.errors import MAX_LENGTH, ConfigError
from vllm_kvcompress.plans import RequestOptions
from vllm_kvcompress.request_options import (
    MAX_PINS,
    REQUEST_KEYS,
    check_fits_server,
    parse_request,
)

RUNS = settings(max_examples=300, deadline=None)

PATHS = [
    "version",
    "policy",
    "policy.name",
    "policy.kernel_size",
    "policy.pooling",
    "policy.scorer",
    "policy.scorer.name",
    "policy.scorer.kernel_size",
    "budget",
    "budget.ratio",
    "budget.tokens",
    "budget.floor",
    "layer_groups",
    "layer_groups.count",
    "layer_groups.size",
    "layer_budget",
    "layer_budget.shape",
    "layer_budget.beta",
    "layer_budget.gamma",
    "layer_budget.form",
    "layer_budget.preferences",
    "codebook",
    "codebook.shallow",
    "codebook.groups",
    "codebook.entries",
    "codebook.key_threshold",
    "codebook.value_threshold",
    "codebook.extend",
    "num_sink_tokens",
    "observation_window",
    "trigger",
    "pressure",
    "pressure.when",
    "pressure.until",
    "interval",
    "prompt_interval",
    "min_prompt_len",
    "shared_blocks",
    "pinned",
    "mode",
    "draft",
    "draft.tokens",
    "draft.adaptive",
    "draft.min_confidence",
    "draft.sample",
    "draft.budget",
    "draft.budget.ratio",
    "draft.refresh_every",
    "draft.refresh_below",
    "draft.acceptance",
    "draft.typical_epsilon",
    "draft.typical_delta",
    "sessions",
    "sessions.max_blocks_ratio",
    "task",
    "tasks",
    "tasks.localization",
    "tasks.aggregation",
    "tasks.aggregation.policy",
    "tasks.localization.budget",
    "tasks.localization.policy.scorer.kernel_size",
]

WORDS = ["name", "ratio", "scorer", "budget", "evict", "draft", "both", "interval", "linear"]
WORDS += ["prompt"]
WORDS += ["localization", "[key]", "tuple[", "function-after[x]", "a.b", "", "\n", "\ud800", "none"]
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**4000), 0, 1, 2, 0.5])
words = st.sampled_from(WORDS) | st.text(max_size=8) | st.just("x" * 5000)
leaves = st.none() | st.booleans() | numbers | words
values = st.recursive(
    leaves | st.dates() | st.binary(max_size=3) | st.builds(object),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(words | st.integers(), inner, max_size=4)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


def laid_out(fields: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}; of two that do not fit together, the last."""
    found: dict[str, Any] = {}
    for path, value in fields.items():
        *folders, name = path.split(".")
        at = found
        for folder in folders:
            if not isinstance(at.get(folder), dict):
                at[folder] = {}
            at = at[folder]
        at[name] = value
    return found


def check(read: Any, *beginnings: str) -> Any:
    """The result of `read`, or None after a sentence as it should be."""
    try:
        return read()
    except ConfigError as error:
        message = str(error)
    assert len(message) <= MAX_LENGTH and message.isprintable() and message.endswith(".")
    assert message.startswith(beginnings), message
    return None


def check_setting(config: CompressionConfig | None) -> None:
    if config is not None:
        assert parse_config(config.to_dict()) == config
        assert config.build_policy() is not None
        assert all(parse_config(each.to_dict()) == each for each in config.by_task.values())


@RUNS
@given(
    st.sampled_from(["snapkv", "windowkv", "adakv", "spindlekv", "rkv", "knorm"]),
    st.dictionaries(st.sampled_from(PATHS), values, min_size=1, max_size=3),
)
def test_any_value_for_any_field(preset: str, fields: dict[str, Any]) -> None:
    overrides = laid_out(fields)
    both = f"preset {preset} with --kv-compression-config"
    check_setting(check(lambda: parse_config(preset, overrides), both, "--kv-compression-config: "))
    mapping = {"preset": preset, **overrides}
    check_setting(check(lambda: parse_config(mapping), f"preset {preset}: ", "kv_compression: "))


def test_no_field_was_forgotten() -> None:
    assert {path.partition(".")[0] for path in PATHS} == set(CompressionConfig.model_fields)


@pytest.mark.parametrize("path", PATHS)
def test_every_field_refuses_what_it_cannot_take(path: str) -> None:
    deep: Any = 1
    for _ in range(3000):
        deep = [deep]
    endless: list[Any] = []
    endless += [endless, endless]
    odd = [deep, endless, [[]] * 10**5, {"x" * 10**5: 1}, {1: 2}, object(), 10**5000, "\ud800"]
    for value in odd:
        for preset in ("snapkv", "adakv"):
            fields = laid_out({path: value})
            message = f"preset {preset} with --kv-compression-config: "
            assert (
                check(lambda f=fields, p=preset: parse_config(p, f), message, "--kv-compression-c")
                is None
            )


@RUNS
@given(values)
def test_anything_for_a_setting(value: Any) -> None:
    check(lambda: parse_config(value), "kv_compression: ", "--kv-compression: ")
    if value is not None:
        check(lambda: parse_config("snapkv", value), "--kv-comp", "preset snapkv with --kv-comp")


@RUNS
@given(st.dictionaries(st.sampled_from(PATHS), values, max_size=4), st.booleans())
def test_any_fields_in_a_file(tmp_path_factory, fields: dict[str, Any], flow: bool) -> None:
    start = {"policy.name": "snapkv", "budget.ratio": 0.1}
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    try:
        text = yaml.dump(laid_out(start | fields), default_flow_style=flow)
        path.write_text(text, encoding="utf-8")
    except (ValueError, TypeError):
        return  # no YAML of it: a number of 5000 digits, half an emoji
    check_setting(check(lambda: parse_config(str(path)), f"{path}: "))


YAML_PIECES = [
    "a",
    "a: ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    ",",
    ": ",
    "\n",
    "  ",
    "&x ",
    "*x",
    "<<: ",
    "!",
]
YAML_PIECES += [
    "!!set ",
    "? ",
    "'",
    '"',
    "|\n",
    ">",
    "#",
    "%",
    "---\n",
    "...\n",
    "~",
    "1",
    "1e5",
    "\t",
]
YAML_PIECES += ["0x", "_", ".", "\\U", "2024-13-99", "=", "@", "\0", "true", "policy: ", "\ufeff"]


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from(YAML_PIECES), max_size=14) | st.text(max_size=20).map(list))
def test_any_text_as_yaml(pieces: list[str]) -> None:
    check(lambda: parse_yaml("".join(pieces), "x.yaml"), "x.yaml: ")


@RUNS
@given(st.lists(st.sampled_from([*'{}[]:,"', '"a"', "1", "1e999", "NaN", "null"]), max_size=12))
def test_any_text_as_json(pieces: list[str]) -> None:
    check(lambda: parse_json("".join(pieces)), "--kv-compression-config: ")


@RUNS
@given(st.text(max_size=30) | st.sampled_from(["~x/", "/", "./", ".yaml", "/dev/null", "~"]))
def test_any_name(name: str) -> None:
    if name not in preset_names():
        check(lambda: parse_config(name), "--kv-compression: ")


# --- requests -----------------------------------------------------------------------------


@RUNS
@given(st.dictionaries(st.sampled_from(REQUEST_KEYS) | words | st.integers(), values, max_size=3))
def test_anything_in_a_request(extra: dict[Any, Any]) -> None:
    for prompt_len in (None, 1000):
        options = check(lambda n=prompt_len: parse_request(extra, n), "kv_")
        if options is not None:
            assert isinstance(options, RequestOptions) and hash(options) is not None
            for server in ("snapkv", "windowkv"):
                check(lambda s=server, o=options: check_fits_server(parse_config(s), o), "kv_")


@pytest.mark.parametrize(
    ("extra", "beginning"),
    [
        ({"kv_budget_tokens": 10**400}, "kv_budget_tokens: expected a number below 2**63"),
        ({"kv_budget_ratio": -(10**5000)}, "kv_budget_ratio: expected a number below 2**63"),
        ({"kv_budget_tokens": 1e300}, "kv_budget_tokens: expected a number below 2**63"),
        ({"kv_draft_tokens": 10**400}, "kv_draft_tokens: expected a number below 2**63"),
        ({"kv_compression": {"preset": "x"}}, "kv_compression: there is no preset {'preset'"),
        ({"kv_compression": object()}, "kv_compression: there is no preset <object"),
        ({"kv_compression": "x" * 10**6}, "kv_compression: there is no preset 'xxx"),
        ({"kv_compression": ["snapkv"]}, "kv_compression: there is no preset ['snapkv']"),
        ({"kv_pin": [1] * 99_999}, "kv_pin: expected a list [start, end, start, end, ...]"),
        ({"kv_pin": ["1"] * 100_000}, "kv_pin: at most 256 ranges, got 50000; pin longer ones"),
        ({"kv_pin": [0, 10**5000]}, "kv_pin: [0, a number of 5001 digits] must satisfy"),
        ({"kv_task": ["auto"] * 10**5}, "kv_task: must be auto, localization or aggregation"),
        ({"kv_task": {}}, "kv_task: must be auto, localization or aggregation"),
        ({"kv_budget" + "x" * 10**5: 1}, "kv_budgetxxx"),
        ([1], "vllm_xargs: expected keys and values, got [1]"),
    ],
)
def test_odd_requests(extra: Any, beginning: str) -> None:
    assert check(lambda: parse_request(extra, 1000), beginning) is None


def test_keys_that_are_no_text_are_not_ours() -> None:
    assert parse_request({1: 2, None: 3, ("kv_pin",): 4}) == RequestOptions()
    assert parse_request({}) == parse_request(None) == RequestOptions()


def test_pins_may_overlap_and_be_many() -> None:
    pins = [number for start in range(MAX_PINS) for number in (start % 9, start % 9 + 50)]
    assert len(parse_request({"kv_pin": pins}, 1000).pins) == MAX_PINS


@pytest.mark.parametrize("name", ["../x.yaml", "/etc/passwd", "./x.yaml", "x.yaml", "~/x.yml", "~"])
def test_a_request_never_reaches_the_file_system(name, tmp_path, monkeypatch) -> None:
    """A name in a request is compared with the presets' names, even if there is such a file."""
    folder = tmp_path / "inside"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for path in (folder / "x.yaml", tmp_path / "x.yaml"):
        path.write_text("policy: {name: knorm}\nbudget: {ratio: 0.1}\n")

    def opened(*args: Any) -> None:
        raise AssertionError(f"opened {args}")

    monkeypatch.setattr(yaml_reader, "read_yaml_file", opened)
    monkeypatch.setattr(config_module, "read_yaml_file", opened)
    for key in ("kv_compression", "kv_task"):
        with pytest.raises(ConfigError, match=f"^{key}: "):
            parse_request({key: name})

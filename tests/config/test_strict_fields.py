"""No coercion at any depth, the right field in every message, and nothing that does nothing."""

from typing import Any

import pytest
import yaml

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import MAX_LENGTH, ConfigError, config_error
from vllm_kvcompress.request_options import parse_request, resolve_request

OVERRIDDEN = "with --kv-compression-config: "


def nested(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for the path "a.b"."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def refusal(preset: str, overrides: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(preset, overrides)
    message = str(caught.value)
    assert len(message) <= MAX_LENGTH and message.isprintable() and message.endswith(".")
    return message


# --- types --------------------------------------------------------------------------------

FLOATS = [
    ("snapkv", "budget.ratio"),
    ("pyramidkv", "layer_budget.beta"),
    ("spindlekv", "codebook.shallow"),
    ("spindlekv", "codebook.entries"),
    ("spindlekv", "codebook.key_threshold"),
    ("spindlekv", "codebook.value_threshold"),
    ("snapkv", "draft.min_confidence"),
    ("snapkv", "draft.refresh_below"),
    ("snapkv", "draft.typical_epsilon"),
    ("snapkv", "draft.budget.ratio"),
    ("cake", "policy.gamma"),
    ("adakv", "policy.safeguard"),
    ("criticalkv", "policy.epsilon"),
    ("windowkv", "tasks.aggregation.budget.ratio"),
]
INTS = [
    ("snapkv", "version"),
    ("snapkv", "budget.tokens"),
    ("snapkv", "budget.floor"),
    ("snapkv", "layer_groups.count"),
    ("snapkv", "num_sink_tokens"),
    ("snapkv", "observation_window"),
    ("snapkv", "interval"),
    ("snapkv", "min_prompt_len"),
    ("snapkv", "draft.tokens"),
    ("windowkv", "layer_budget.gamma"),
    ("snapkv", "policy.kernel_size"),
    ("random", "policy.seed"),
    ("adakv", "policy.scorer.kernel_size"),
    ("windowkv", "tasks.localization.policy.window_size"),
    ("windowkv", "tasks.aggregation.observation_window"),
]
BOOLS = [
    ("spindlekv", "codebook.extend"),
    ("snapkv", "draft.adaptive"),
    ("streaming_llm", "policy.rerotate_keys"),
    ("expected_attention", "policy.use_vnorm"),
]
WORDS = [("snapkv", "trigger"), ("snapkv", "mode"), ("snapkv", "policy.name"), ("cake", "task")]
NO_NUMBERS: list[Any] = [True, False, "0.5", "1", "", [1], {"a": 1}, float("nan"), float("inf")]
NO_NUMBERS += [10**400, 10**5000, object(), b"1", {1}, {1: 2}, 1j]


@pytest.mark.parametrize(("preset", "path"), FLOATS + INTS)
def test_a_number_is_a_number(preset: str, path: str) -> None:
    for value in NO_NUMBERS:
        if path.endswith("entries") and value == [1]:
            continue  # one share per coded group
        message = refusal(preset, nested(path, value))
        assert f"{path}: " in message or (isinstance(value, dict) and f"{path}.a" in message)


@pytest.mark.parametrize(("preset", "path"), INTS)
def test_a_whole_number_has_no_point(preset: str, path: str) -> None:
    assert f"{path}: " in refusal(preset, nested(path, 3.0))


@pytest.mark.parametrize(("preset", "path"), BOOLS)
def test_true_and_false_are_no_numbers_or_words(preset: str, path: str) -> None:
    for value in (0, 1, 1.0, "true", "True", "yes", [], {}):
        assert f"{path}: input should be true or false" in refusal(preset, nested(path, value))


@pytest.mark.parametrize(("preset", "path"), WORDS)
def test_words_are_words(preset: str, path: str) -> None:
    for value in (0, 1.5, True, [], {}, "no such word", "x" * 10**6, "\n"):
        assert f"{path}: " in refusal(preset, nested(path, value))


def test_a_whole_number_is_a_share_too() -> None:
    config = parse_config("cake", {"budget": {"ratio": 1}, "policy": {"gamma": 3}})
    assert config.budget.ratio == 1.0 and config.build_policy().gamma == 3.0


def test_items_of_lists() -> None:
    groups = {"layer_groups": {"size": 1}}
    for fields, path in (
        ({"pinned": [[0, True]]}, "pinned.0.1: "),
        ({"pinned": [["0", 1]]}, "pinned.0.0: "),
        ({"pinned": "0-5"}, "pinned: input should be a list"),
        ({"codebook": {"groups": [True], "shallow": None}}, "codebook.groups.0: "),
        ({"codebook": {"entries": [0.5, "0.5"]}}, "codebook.entries.1: "),
        ({"layer_budget": {"shape": "preference", "preferences": [1, True]}}, "preferences.1: "),
    ):
        assert path in refusal("spindlekv", fields | groups)


# --- which field --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "overrides", "words"),
    [
        ("keydiff", {"policy": {"kernel": 4}}, "policy.kernel: keydiff takes no parameters."),
        ("chunkkv", {"policy": {"name": "knorm", "a": 1}}, "policy.a: knorm takes no parameters."),
        (
            "chunkkv",
            {"policy": {"scorer": {"name": "tova", "pooling": "max"}}},
            "policy.scorer.pooling: tova takes no parameters.",
        ),
        (
            "chunkkv",
            {"policy": {"scorer": {"kernel": 4}}},
            "policy.scorer.kernel: unknown field (did you mean 'kernel_size'?); allowed are kernel",
        ),
        ("adakv", {"policy": {"scorer": {"kernel_size": 4}}}, "policy.scorer.kernel_size: must be"),
        ("adakv", {"policy": {"scorer": {"name": "x"}}}, "policy.scorer.name: there is no policy"),
        ("adakv", {"policy": {"scorer": {"name": 3}}}, "policy.scorer.name: input should be"),
        ("adakv", {"policy": {"scorer": 3}}, "policy.scorer: input should be a mapping"),
        ("adakv", {"policy": {"scorer": {"name": "chunkkv"}}}, "policy.scorer: chunkkv itself"),
        (
            "adakv",
            {"policy": {"scorer": {"name": "chunkkv", "scorer": {"name": "cake", "gamma": -1}}}},
            "policy.scorer.scorer.gamma: input should be greater",
        ),
        (
            "knorm",
            {"policy": {"name": "criticalkv", "scorer": {"kernel_size": 5}}},
            "policy.scorer.name: this field is required",
        ),
        (
            "chunkkv",
            {"policy": {"scorer": {"name": "streaming_llm", "rerotate_keys": True}}},
            "policy.scorer: streaming_llm must not re-rotate",
        ),
        (
            "chunkkv",
            {
                "tasks": {
                    "localization": {"policy": {"scorer": {"kernel_size": "5"}}},
                    "aggregation": {},
                }
            },
            "tasks.localization.policy.scorer.kernel_size: input should be a valid integer",
        ),
        ("windowkv", {"tasks": {"qa": {}}}, "tasks.qa: input should be 'localization' or"),
        ("windowkv", {"tasks": {"aggregation": 3}}, "tasks.aggregation: input should be a mapping"),
        (
            "windowkv",
            {"tasks": {"aggregation": {"budget": {"rato": 1}}}},
            "tasks.aggregation.budget.rato: unknown field (did you mean 'ratio'?)",
        ),
        ("spindlekv", {"codebook": {"groups": []}}, "codebook.groups: name at least one"),
        ("snapkv", {"mode": "draft", "draft": {"tokns": 1}}, "draft.tokns: unknown field (did"),
        (
            "snapkv",
            {"mode": "draft", "draft": {"min_confidence": 0.5, "sample": "probabilistic"}},
            "draft.min_confidence: goes with",
        ),
        ("snapkv", {"budget": {"ratio": 2}, "mode": 1}, "(and 1 more)"),
    ],
)
def test_the_field_is_the_one_the_user_wrote(preset: str, overrides: dict, words: str) -> None:
    message = refusal(preset, overrides)
    assert words in message and message.startswith(f"preset {preset} {OVERRIDDEN}")


def test_another_scorer_drops_the_old_ones_parameters() -> None:
    config = parse_config("chunkkv", {"policy": {"scorer": {"name": "keydiff"}}})
    assert config.policy.params["scorer"] == {"name": "keydiff"}
    assert config.policy.params["chunk_length"] == 20


# --- fields that do nothing ---------------------------------------------------------------

DRAFTS = [
    ("tokens", 3),
    ("tokens", 4),
    ("adaptive", True),
    ("min_confidence", 0.5),
    ("sample", "probabilistic"),
    ("refresh_every", 8),
    ("refresh_below", 0.5),
    ("acceptance", "typical"),
]


@pytest.mark.parametrize(("name", "value"), DRAFTS)
def test_how_to_draft_where_nothing_is_drafted(name: str, value: Any) -> None:
    message = refusal("snapkv", {"draft": {name: value}})
    assert f"draft.{name}" in message and "nothing is drafted in the mode evict" in message
    assert "mode to draft (--kv-compression-mode draft), or set draft.budget." in message
    assert parse_config("snapkv", {"mode": "draft", "draft": {name: value}}).drafts
    if not name.startswith("refresh"):
        assert parse_config("snapkv", {"draft": {name: value, "budget": {"ratio": 0.1}}}).drafts


def test_who_types_the_flag_finds_it_in_the_sentence() -> None:
    assert "draft.tokens (--kv-draft-tokens): " in refusal("snapkv", {"draft": {"tokens": 2}})


def test_a_drafting_file_may_be_served_without_drafts(tmp_path) -> None:
    path = tmp_path / "x.yaml"
    draft = {"mode": "draft", "draft": {"tokens": 3, "acceptance": "typical"}}
    path.write_text(yaml.safe_dump(parse_config("snapkv", draft).to_dict()))
    assert parse_config(str(path)).num_draft_tokens == 3
    assert parse_config(str(path), {"mode": "evict"}) == parse_config("snapkv")
    assert "draft.tokens" in refusal(str(path), {"mode": "evict", "draft": {"tokens": 3}})


IDLE = [
    ("snapkv", {"task": "localization"}, "task: this setting does not depend on the task"),
    ("windowkv", {"policy": {"name": "cake"}, "task": "localization"}, "task: this setting"),
    ("snapkv", {"interval": 64}, "interval: nothing is done at intervals; set trigger"),
    ("keydiff", {"trigger": "end_of_prompt", "draft": {"tokens": 1}}, "draft.tokens"),
    ("rkv", {"min_prompt_len": 64}, "min_prompt_len: nothing is done when prompts end"),
    ("snapkv", {"layer_budget": {"shape": "pyramid"}}, "layer_budget.shape: pyramid spreads"),
]


@pytest.mark.parametrize(("preset", "fields", "words"), IDLE)
def test_what_changes_nothing_is_refused(preset: str, fields: dict, words: str, tmp_path) -> None:
    assert f"preset {preset} {OVERRIDDEN}{words}" in refusal(preset, fields)
    with pytest.raises(ConfigError, match=words.partition(":")[0]):
        parse_config({"preset": preset, **fields})


def test_what_changes_nothing_in_a_file_is_refused(tmp_path) -> None:
    path = tmp_path / "x.yaml"
    for extra in ("task: aggregation", "interval: 7", "layer_budget: {shape: linear}"):
        path.write_text(f"policy: {{name: knorm}}\nbudget: {{ratio: 0.5}}\n{extra}\n")
        assert extra.partition(":")[0] in refusal(str(path), {})
    fields = {"policy": {"name": "knorm"}, "budget": {"ratio": 0.5}, "task": "aggregation"}
    with pytest.raises(ConfigError, match="kv_compression: task: "):
        parse_config(fields)


@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        ("rkv", {"trigger": "end_of_prompt"}),  # the preset has an interval
        ("spindlekv", {"codebook": None}),
        ("pyramidkv", {"layer_groups": {"count": 1}}),  # the preset has a shape
        ("windowkv_llama3", {"layer_budget": {"form": "printed"}}),  # the preset has a gamma
        ("windowkv_qwen2.5", {"policy": {"name": "cake"}}),
        ("rkv", {"trigger": "both", "min_prompt_len": 64}),
        ("spindlekv", {"interval": 64}),
        ("windowkv", {"task": "aggregation"}),
        ("snapkv", {"task": "auto", "interval": 128, "min_prompt_len": 512}),  # the defaults
        ("snapkv", {"draft": {}}),
        ("snapkv", {"draft": {"budget": None, "refresh_every": None}}),
    ],
)
def test_what_a_preset_brings_is_no_mistake(preset: str, fields: dict, tmp_path) -> None:
    config = parse_config(preset, fields)
    assert parse_config(config.to_dict()) == config
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert parse_config(str(path)) == config


def test_a_fixed_task_goes_with_the_tasks(tmp_path) -> None:
    path = tmp_path / "x.yaml"
    config = parse_config("windowkv", {"task": "aggregation"})
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert parse_config(str(path)).task == "aggregation"
    other = parse_config(str(path), {"policy": {"name": "keydiff"}})
    assert (other.task, other.tasks) == ("auto", {})


def test_what_a_request_runs_under_survives_the_way_to_another_process() -> None:
    drafting = parse_config({"preset": "snapkv", "mode": "draft", "draft": {"tokens": 3}})
    for server in (parse_config("windowkv"), drafting):
        for preset in ("snapkv", "windowkv", "cake"):
            options = parse_request({"kv_compression": preset, "kv_budget_ratio": 0.5})
            config = resolve_request(server, options, "aggregation")
            assert parse_config(config.to_dict()) == config
            assert config.drafts == server.drafts


def test_of_a_sentence_that_is_too_long_the_users_part_is_cut() -> None:
    rule = "allowed are " + ", ".join("abcdefghijklmnopqrstuvwxyz")
    text = str(config_error("s" * 1000, "f" * 1000, rule, "g" * 1000))
    assert len(text) <= MAX_LENGTH and rule in text and text.startswith("sss")
    assert "'ggg" in text and "ggg'." in text
    text = str(config_error("file", "field", "r" * 1000, "x"))
    assert len(text) == MAX_LENGTH and text.startswith("file: field: rrr")

"""Settings: presets, files, overrides and the sentences a user reads."""

import pytest
import yaml

from vllm_kvcompress.config.reading import parse_config, parse_json, preset_names
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.lengths.decode_queries import decode_window
from vllm_kvcompress.registry import load_policy_class, policy_names
from vllm_kvcompress.request_options import (
    check_fits_server,
    choose_task,
    parse_request,
    resolve_request,
)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_survives_a_round_trip(name: str) -> None:
    config = parse_config(name)
    assert isinstance(config, CompressionConfig)
    assert parse_config(config.to_dict()) == config
    policy_class = load_policy_class(config.policy.name)
    assert config.build_policy() == policy_class(**config.policy.params)
    assert all(each.to_dict() for each in config.by_task.values())


def test_every_policy_has_a_preset_and_a_row_in_the_readme(root) -> None:
    for name in policy_names():
        assert parse_config(name).policy.name == name
    readme = (root / "README.md").read_text(encoding="utf-8")
    for name in policy_names():
        assert f"| `{name}` |" in readme, f"README.md has no row for {name}"


@pytest.mark.parametrize("setting", [None, "none", {"preset": "none"}])
def test_none_means_off(setting) -> None:
    assert parse_config(setting) is None


def test_a_file_is_read_like_a_preset(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    fields = parse_config("snapkv").to_dict() | {"min_prompt_len": 7}
    path.write_text(yaml.safe_dump(fields))
    assert parse_config(str(path)).min_prompt_len == 7


def test_overrides_are_laid_over_the_preset() -> None:
    config = parse_config("snapkv", {"budget": {"ratio": 0.25}, "policy": {"kernel_size": 7}})
    assert config.budget.ratio == 0.25
    assert config.budget.floor == 64, "what was not overridden stays"
    assert config.policy.params == {"kernel_size": 7, "pooling": "avg"}


def test_one_of_two_exclusive_fields_replaces_the_other() -> None:
    config = parse_config("windowkv", {"budget": {"tokens": 512}, "layer_groups": {"size": 2}})
    assert (config.budget.ratio, config.budget.tokens) == (None, 512)
    assert (config.layer_groups.count, config.layer_groups.size) == (None, 2)


def test_another_policy_drops_the_old_ones_parameters() -> None:
    config = parse_config("windowkv", {"policy": {"name": "keydiff"}})
    assert config.policy.params == {} and config.tasks == {}
    config = parse_config("pyramidkv", {"layer_budget": {"shape": "uniform"}})
    assert config.layer_budget.beta is None


def test_a_task_lays_fields_over_the_setting() -> None:
    config = parse_config("windowkv_llama3")
    found, together = config.by_task["localization"], config.by_task["aggregation"]
    assert (found.observation_window, together.observation_window) == (16, 32)
    assert found.policy.params["window_score"] == "mean"
    assert together.policy.params == {
        "window_size": 16,
        "window_score": "top_half",
        "share_indices": True,
    }
    assert (found.task, found.tasks) == ("localization", {})


def test_what_a_trigger_asks_for() -> None:
    assert parse_config("rkv").compresses_while_decoding
    assert not parse_config("rkv").compresses_prompts
    both = parse_config("keydiff", {"trigger": "both", "interval": 1})
    assert both.compresses_while_decoding and both.compresses_prompts


def test_a_mapping_may_start_from_a_preset() -> None:
    config = parse_config({"preset": "keydiff", "budget": {"ratio": 0.5}})
    assert (config.policy.name, config.budget.ratio) == ("keydiff", 0.5)


WRONG = [
    ("windokv", None, ["--kv-compression", "'windokv'", "did you mean 'windowkv'", "snapkv"]),
    ("no/such.yaml", None, ["no file no/such.yaml"]),
    ("snapkv", {"budgt": {}}, ["budgt", "unknown field", "did you mean 'budget'", "layer_groups"]),
    ("snapkv", {"budget": {"ration": 1}}, ["budget.ration", "did you mean 'ratio'", "tokens"]),
    ("snapkv", {"budget": {"ratio": 1.5}}, ["budget.ratio", "less than or equal to 1", "1.5"]),
    ("snapkv", {"budget": {"ratio": "x"}}, ["budget.ratio", "valid number", "'x'"]),
    ("snapkv", {"budget": {"ratio": 0.5, "tokens": 9}}, ["budget", "exactly one of ratio"]),
    ("snapkv", {"policy": {"kernel_size": 4}}, ["policy.kernel_size", "must be odd"]),
    ("snapkv", {"policy": {"kernel": 4}}, ["policy.kernel", "unknown field", "kernel_size"]),
    ("snapkv", {"policy": {"name": "h3o"}}, ["no policy 'h3o'", "keydiff", "windowkv"]),
    ("windowkv", {"policy": {"window_score": "max"}}, ["policy.window_score", "'mean'"]),
    ("windowkv", {"task": "qa"}, ["task", "'auto'", "'localization'", "'aggregation'"]),
    (
        "windowkv",
        {"tasks": {"localization": {"observation_window": 0}}},
        ["tasks.localization.observation_window", "greater than or equal to 1"],
    ),
    (
        "windowkv",
        {"tasks": {"aggregation": {"policy": {"omega": 3}}}},
        ["tasks.aggregation.policy.omega", "unknown field", "window_size"],
    ),
    (
        "windowkv",
        {"tasks": {"aggregation": {"layer_groups": {"count": 1}}}},
        ["tasks.aggregation.layer_groups", "cannot depend on the task"],
    ),
    ("snapkv", {"tasks": {"aggregation": {}}}, ["tasks", "give both"]),
    ("snapkv", {"layer_budget": {"beta": 3}}, ["layer_budget", "beta means nothing to", "uniform"]),
    (
        "snapkv",
        {"layer_budget": {"shape": "linear", "beta": 0.7}},
        ["layer_budget", "above 0 and below 0.5"],
    ),
    ("snapkv", {"layer_budget": {"shape": "preference"}}, ["one per layer group"]),
    (
        "snapkv",
        {"trigger": "both", "interval": 8},
        ["interval", "at least observation_window (16)"],
    ),
    ("h2o", {"trigger": "both"}, ["trigger", "h2o cannot compress while decoding"]),
    ("chunkkv", {"policy": {"scorer": {"name": "adakv"}}}, ["policy.scorer: adakv itself"]),
    ("snapkv", {"layer_budget": {"shape": "flat"}}, ["layer_budget.shape", "'pyramid'"]),
    ("snapkv", {"pinned": [[9, 3]]}, ["[9, 3] is empty"]),
    ("snapkv", {"pinned": [[9]]}, ["pinned.0", "at least 2 items"]),
    ("snapkv", {"version": 2}, ["version"]),
    ("snapkv", {"trigger": "decode"}, ["trigger", "'end_of_prompt'"]),
    (None, {"budget": {"ratio": 0.5}}, ["--kv-compression is not set"]),
    (["snapkv"], None, ["expected a preset name"]),
    ({"preset": 3}, None, ["kv_compression: preset: must be a name"]),
]


@pytest.mark.parametrize(("setting", "overrides", "words"), WRONG)
def test_wrong_settings_are_one_helpful_sentence(setting, overrides, words) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(setting, overrides)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    for word in words:
        assert word in message


def test_the_message_names_the_users_file(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("policy: {name: snapkv}\nbudget: {ratio: 7}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: budget\.ratio"):
        parse_config(str(path))
    path.write_text("policy: [")
    with pytest.raises(ConfigError, match=r"mine\.yaml: not valid YAML"):
        parse_config(str(path))
    path.write_text("- 3")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        parse_config(str(path))


@pytest.mark.parametrize("text", ["{", "3", "[1]"])
def test_bad_json_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--kv-compression-config"):
        parse_json(text)


# --- per request --------------------------------------------------------------------------


def resolve(extra: dict, server: str = "snapkv") -> CompressionConfig | None:
    return resolve_request(parse_config(server), parse_request(extra, 1000))


def test_a_request_may_say_nothing_or_speak_of_other_things() -> None:
    assert resolve({}) == parse_config("snapkv")
    assert resolve({"kv_transfer_params": {}, "other": 1}) == parse_config("snapkv")


def test_a_request_may_opt_out_or_choose() -> None:
    assert resolve({"kv_compression": "none"}) is None
    assert resolve({"kv_compression": "keydiff"}) == parse_config("keydiff")
    assert resolve({"kv_budget_ratio": 0.3}).budget.ratio == 0.3
    chosen = resolve({"kv_compression": "keydiff", "kv_budget_tokens": 99})
    assert (chosen.budget.ratio, chosen.budget.tokens) == (None, 99)


def test_a_requests_pins_come_on_top() -> None:
    server = parse_config("snapkv", {"pinned": [[0, 10]]})
    config = resolve_request(server, parse_request({"kv_pin": [20, 30, 40, 50]}, 1000))
    assert [list(pin) for pin in config.pinned] == [[0, 10], [20, 30], [40, 50]]


BAD_REQUESTS = [
    ({"kv_compression": "zip"}, ["kv_compression", "'zip'", "none", "windowkv"]),
    ({"kv_compression": 3}, ["kv_compression"]),
    ({"kv_budget_ratio": 0}, ["kv_budget_ratio", "greater than 0"]),
    ({"kv_budget_ratio": 1.01}, ["kv_budget_ratio", "at most 1"]),
    ({"kv_budget_ratio": "half"}, ["kv_budget_ratio", "expected a number", "'half'"]),
    ({"kv_budget_ratio": True}, ["kv_budget_ratio", "expected a number"]),
    ({"kv_budget_tokens": 0}, ["kv_budget_tokens", "from 1 up"]),
    ({"kv_budget_tokens": 1.5}, ["kv_budget_tokens", "whole number"]),
    ({"kv_budget_tokens": float("inf")}, ["kv_budget_tokens", "finite"]),
    ({"kv_budget_ratio": float("nan")}, ["kv_budget_ratio", "finite"]),
    ({"kv_budget_ratio": 0.5, "kv_budget_tokens": 5}, ["only one of the two"]),
    ({"kv_pin": [1]}, ["kv_pin", "start, end"]),
    ({"kv_pin": "0-10"}, ["kv_pin", "start, end"]),
    ({"kv_pin": [0, 1.5]}, ["kv_pin", "whole numbers"]),
    ({"kv_pin": [5, 5]}, ["kv_pin", "0 <= start < end"]),
    ({"kv_pin": [-1, 5]}, ["kv_pin", "0 <= start < end"]),
    ({"kv_pin": [0, 1001]}, ["kv_pin", "1000"]),
    ({"kv_budget": 3}, ["kv_budget: unknown key", "did you mean", "kv_pin"]),
    ({"kv_task": "qa"}, ["kv_task", "auto, localization or aggregation"]),
    ({"kv_tasks": "auto"}, ["kv_tasks: unknown key", "did you mean 'kv_task'"]),
]


@pytest.mark.parametrize(("extra", "words"), BAD_REQUESTS)
def test_bad_requests_are_one_helpful_sentence(extra: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_request(extra, 1000)
    for word in words:
        assert word in str(caught.value)


# --- tasks and rings ----------------------------------------------------------------------


def never() -> str:
    raise AssertionError("the classifier must not be asked")


def test_who_decides_the_task() -> None:
    server = parse_config("windowkv")
    fixed = parse_config("windowkv", {"task": "aggregation"})
    asked = parse_request({"kv_task": "localization"})
    assert choose_task(server, asked, never) == ("localization", "request")
    assert choose_task(fixed, parse_request({}), never) == ("aggregation", "config")
    assert choose_task(fixed, asked, never) == ("localization", "request")
    auto = parse_request({"kv_task": "auto"})
    assert choose_task(fixed, auto, lambda: "localization") == ("localization", "classifier")
    assert choose_task(server, parse_request({}), lambda: "aggregation")[1] == "classifier"
    assert choose_task(server, parse_request({}), lambda: None) == ("localization", "default")
    assert choose_task(parse_config("snapkv"), parse_request({}), never) == (None, None)
    assert choose_task(server, parse_request({"kv_compression": "none"}), never) == (None, None)


def test_the_task_changes_the_setting_a_request_runs_under() -> None:
    server, options = parse_config("windowkv_llama3"), parse_request({"kv_budget_ratio": 0.5})
    windows = {
        task: resolve_request(server, options, task).observation_window
        for task in ("localization", "aggregation")
    }
    assert windows == {"localization": 16, "aggregation": 32}
    assert resolve_request(server, options, "aggregation").budget.ratio == 0.5
    assert server.by_task["aggregation"].budget.ratio == 0.12, "no trace of the request is left"


def test_a_request_must_fit_the_server() -> None:
    snapkv, rkv = parse_config("snapkv"), parse_config("rkv")
    assert (decode_window(snapkv), decode_window(rkv)) == (0, 8)
    assert decode_window(parse_config("keydiff", {"trigger": "both"})) == 0
    check_fits_server(rkv, parse_request({"kv_compression": "rkv"}))
    check_fits_server(rkv, parse_request({"kv_compression": "snapkv"}))
    with pytest.raises(ConfigError, match="reads 8 queries while decoding and this server keeps 0"):
        check_fits_server(snapkv, parse_request({"kv_compression": "rkv"}))
    with pytest.raises(ConfigError, match="kv_task: this server's setting does not depend"):
        check_fits_server(snapkv, parse_request({"kv_task": "aggregation"}))
    check_fits_server(
        snapkv, parse_request({"kv_task": "aggregation", "kv_compression": "windowkv"})
    )


def test_a_request_on_a_drafting_server() -> None:
    server = parse_config({"preset": "snapkv", "mode": "draft", "draft": {"tokens": 4}})
    own = resolve_request(server, parse_request({"kv_draft_tokens": 2}))
    assert (own.num_draft_tokens, own.mode) == (2, "draft")
    other = resolve_request(server, parse_request({"kv_compression": "rkv"}))
    assert (other.policy.name, other.mode, other.num_draft_tokens) == ("rkv", "draft", 4)
    assert other.trigger == "end_of_prompt", "whatever the preset does where tokens are evicted"
    check_fits_server(server, parse_request({"kv_compression": "rkv"}))
    assert resolve_request(server, parse_request({"kv_draft_tokens": 0})) is None
    with pytest.raises(ConfigError, match="at most 4"):
        check_fits_server(server, parse_request({"kv_draft_tokens": 5}))
    evicting = parse_config("snapkv")
    with pytest.raises(ConfigError, match="drafts no tokens"):
        check_fits_server(evicting, parse_request({"kv_draft_tokens": 2}))
    with pytest.raises(ConfigError, match="whole number"):
        parse_request({"kv_draft_tokens": 1.5})


def test_what_the_mode_draft_cannot_do() -> None:
    draft = {"mode": "draft", "budget": {"ratio": 0.1}}
    with pytest.raises(ConfigError, match="end of the prompt"):
        parse_config({**draft, "preset": "rkv"})
    unsure = {"min_confidence": 0.5, "sample": "probabilistic"}
    with pytest.raises(ConfigError, match="min_confidence"):
        parse_config({**draft, "preset": "snapkv", "draft": unsure})
    with pytest.raises(ConfigError, match="budget"):
        parse_config({**draft, "preset": "snapkv", "draft": {"budget": {"ratio": 0.1}}})
    both = {"budget": {"ratio": 0.05}, "refresh_every": 64}
    with pytest.raises(ConfigError, match="refresh"):
        parse_config({"preset": "snapkv", "draft": both})
    with pytest.raises(ConfigError, match="refresh_every"):
        parse_config({**draft, "preset": "h2o", "draft": {"refresh_every": 64}})


def test_typical_acceptance_is_an_opt_in() -> None:
    fields = {"preset": "snapkv", "mode": "draft"}
    assert parse_config(fields).draft.typical_thresholds is None

    def thresholds(**draft: float) -> tuple[float, float]:
        config = parse_config({**fields, "draft": {"acceptance": "typical", **draft}})
        assert parse_config(config.to_dict()) == config, "as it travels to the workers"
        return config.draft.typical_thresholds

    assert thresholds() == pytest.approx((0.09, 0.3))
    assert thresholds(typical_epsilon=0.25) == pytest.approx((0.25, 0.5)), "delta follows epsilon"
    assert thresholds(typical_delta=0.1) == pytest.approx((0.09, 0.1))
    for name in ("typical_epsilon", "typical_delta"):
        for value in (0, 1, -0.1, float("nan")):
            with pytest.raises(ConfigError, match=f"draft.{name}"):
                thresholds(**{name: value})
        with pytest.raises(ConfigError, match=f'{name}.*"typical" only'):
            parse_config({**fields, "draft": {name: 0.3 if name == "typical_delta" else 0.09}})
    with pytest.raises(ConfigError, match=r"draft\.acceptance.*rejection.*typical"):
        parse_config({**fields, "draft": {"acceptance": "lossy"}})
    server = parse_config({**fields, "draft": {"acceptance": "typical"}})
    own = resolve_request(server, parse_request({"kv_compression": "rkv", "kv_draft_tokens": 2}))
    assert own.draft.acceptance == "typical", "the server's, whatever preset the request names"

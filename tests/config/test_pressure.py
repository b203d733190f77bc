"""Settings that wait for memory to be scarce."""

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import ConfigError

SETTING = {"preset": "keydiff", "trigger": "pressure", "pressure": {"when": 0.8, "until": 0.5}}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"pressure": {"when": 0.5, "until": 0.6}}, "until: must be at most when"),
        ({"pressure": {"when": 1.5}}, "pressure.when"),
        ({"pressure": {"high": 0.9}}, "pressure.high: unknown field"),
        ({"preset": "h2o"}, "trigger: h2o cannot compress while decoding"),
        ({"preset": "spindlekv"}, "codebook: books are made when prompts end"),
        ({"mode": "draft"}, "trigger: views to draft over are taken at the end of the prompt"),
        ({"draft": {"budget": {"tokens": 9}}}, "trigger: views to draft over"),
        ({"preset": "snapkv", "interval": 4}, "interval: must be at least observation_window"),
    ],
)
def test_settings_that_do_not_go_with_it(setting: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**SETTING, **setting})


def test_marks_without_the_trigger_do_nothing() -> None:
    with pytest.raises(ConfigError, match="pressure: nothing waits for memory to be scarce"):
        parse_config({"preset": "snapkv", "pressure": {"when": 0.9}})
    tasks = {"localization": {"pressure": {"when": 0.9}}, "aggregation": {}}
    with pytest.raises(ConfigError, match="this field cannot depend on the task"):
        parse_config({"preset": "windowkv", "trigger": "pressure", "tasks": tasks})
    assert "pressure" not in parse_config("snapkv").to_dict()
    config = parse_config(SETTING)
    assert config is not None and parse_config(config.to_dict()) == config

"""When requests that share blocks are compacted."""

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import ConfigError

ALWAYS = {"preset": "windowkv", "shared_blocks": "always"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"trigger": "pressure"}, "shared_blocks: with the trigger pressure the load decides"),
        ({"mode": "draft"}, "shared_blocks: the mode draft gives no blocks back"),
        ({"shared_blocks": "never"}, "shared_blocks: "),
        ({"shared_blocks": True}, "shared_blocks: "),
        (
            {"tasks": {"localization": {"trigger": "pressure"}, "aggregation": {}}},
            "shared_blocks: with the trigger pressure",
        ),
        (
            {"tasks": {"localization": {"shared_blocks": "always"}, "aggregation": {}}},
            "this field cannot depend on the task",
        ),
    ],
)
def test_settings_that_do_not_go_with_it(setting: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**ALWAYS, **setting})


def test_it_is_read_back_as_it_was_written() -> None:
    config = parse_config({**ALWAYS, "draft": {"budget": {"tokens": 64}}})
    assert config is not None and config.shared_blocks == "always"
    assert parse_config(config.to_dict()) == config
    assert "shared_blocks" not in parse_config("windowkv").to_dict()

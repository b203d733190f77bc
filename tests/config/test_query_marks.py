"""Who is told that compression inside prompts loses what the question asks for."""

from typing import Any

import pytest

from vllm_kvcompress.config.query_marks import marks_warning
from vllm_kvcompress.config.reading import parse_config


def warning(**fields: Any) -> str | None:
    config = parse_config({"preset": "snapkv", **fields})
    assert config is not None
    return marks_warning(config)


@pytest.mark.parametrize("trigger", ["prompt", "all"])
@pytest.mark.parametrize("preset", ["snapkv", "adakv", "windowkv", "tova", "auto"])
def test_policies_that_read_queries_are_warned_of(preset: str, trigger: str) -> None:
    found = warning(preset=preset, trigger=trigger, prompt_interval=512)
    assert found is not None
    name = {"auto": "snapkv"}.get(preset, preset)
    assert found.startswith(f"trigger: inside prompts, {name} keeps what the last tokens before")
    assert "before its last 512 tokens" in found and "keydiff" in found


@pytest.mark.parametrize("preset", ["keydiff", "knorm", "streaming_llm"])
def test_others_are_not(preset: str) -> None:
    assert warning(preset=preset, trigger="prompt") is None


@pytest.mark.parametrize("trigger", ["end_of_prompt", "both", "pressure"])
def test_nor_is_anybody_at_the_end_of_prompts(trigger: str) -> None:
    assert warning(trigger=trigger) is None


def test_one_task_is_enough() -> None:
    tasks = {"localization": {"policy": {"name": "keydiff"}}, "aggregation": {}}
    found = warning(trigger="prompt", tasks=tasks)
    assert found is not None and "prompts, snapkv keeps" in found

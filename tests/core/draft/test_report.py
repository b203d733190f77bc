"""What the line at start-up says of drafting: how much, and where it is not exact."""

from typing import Any

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.draft.report import views_alone, views_beside

LOSSY = (
    "; LOSSY: typical acceptance (epsilon 0.09, delta 0.3) does not keep the distribution of "
    "requests with a temperature"
)


def lines(**fields: Any) -> tuple[str | None, str]:
    config = parse_config({"preset": "snapkv", **fields})
    assert config is not None
    return views_alone(config), views_beside(config)


def test_nothing_is_said_where_nothing_is_drafted() -> None:
    assert lines() == (None, "")


@pytest.mark.parametrize(("more", "ending"), [({}, ""), ({"acceptance": "typical"}, LOSSY)])
def test_how_much_is_drafted_over_what(more: dict[str, str], ending: str) -> None:
    alone, _ = lines(mode="draft", min_prompt_len=700, draft={"tokens": 4, **more})
    assert alone == (
        ", mode draft: nothing is evicted; prompts from 700 tokens get a view of that budget, "
        "4 tokens are drafted over it per step and verified over the whole cache" + ending
    )
    beside = lines(draft={"tokens": 4, "budget": {"tokens": 64}, **more})
    assert beside == (None, ", 4 tokens drafted per step over a smaller view" + ending)

"""The one judge of requests, without an engine."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.admission import Admission
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.tracked_request import Phase, SkipReason
from vllm_kvcompress.metrics import CompressionStats


def admission(preset: str = "snapkv", task: str | None = "aggregation") -> Admission:
    planner = Planner(parse_config(preset), num_layer_groups=2, block_size=32)
    found = Admission(planner, SimpleNamespace(model_config=None), 4096, CompressionStats())
    found.classifier = SimpleNamespace(classify=lambda request: task)  # type: ignore[assignment]
    return found


def request(extra: Any = None, prompt_len: int = 2000, max_tokens: int = 9) -> Any:
    return SimpleNamespace(
        request_id="r",
        num_prompt_tokens=prompt_len,
        sampling_params=SimpleNamespace(extra_args=extra),
        resumable=False,
        max_tokens=max_tokens,
    )


def test_workers_are_told_what_was_decided() -> None:
    judge = admission()
    judge.admit(request({"kv_budget_tokens": 600, "other": 1}))
    assert judge.planner.requests["r"].phase is Phase.ARMED
    (setup,) = judge.planner.setups_of(["r", "nobody"]).values()
    assert setup.marks == (2000,) and setup.config.budget.tokens == 600
    assert judge.stats == CompressionStats()


@pytest.mark.parametrize(
    ("arrives", "reason"),
    [
        (request({"kv_compression": "none"}), SkipReason.OPTED_OUT),
        (request(prompt_len=100), SkipReason.SHORT_PROMPT),
        (request(max_tokens=1), SkipReason.SHORT_OUTPUT),
        (request(prompt_len=4095, max_tokens=9), SkipReason.SHORT_OUTPUT),
        (request({"kv_budget": 3}), SkipReason.INVALID_OPTIONS),
        (request([3]), SkipReason.INVALID_OPTIONS),
        (request({"kv_draft_tokens": 2}), SkipReason.INVALID_OPTIONS),
        (request({"kv_compression": "snapkv", "kv_task": "auto"}), SkipReason.INVALID_OPTIONS),
    ],
)
def test_what_is_not_compressed_is_counted_once(arrives: Any, reason: str) -> None:
    judge = admission()
    judge.admit(arrives)
    assert judge.stats.uncompressed == {reason: 1}
    assert not judge.planner.setups_of(["r"])
    assert judge.planner.remove("r") is None, "it is counted already"


@pytest.mark.parametrize(
    ("extra", "classified", "expected"),
    [
        (None, "aggregation", "aggregation/classifier"),
        (None, None, "localization/default"),
        ({"kv_task": "localization"}, "aggregation", "localization/request"),
    ],
)
def test_the_task_is_decided_here(extra: Any, classified: str | None, expected: str) -> None:
    judge = admission("windowkv", classified)
    judge.admit(request(extra))
    assert judge.stats.tasks == {expected: 1}
    (setup,) = judge.planner.setups_of(["r"]).values()
    assert setup.config.task == judge.planner.requests["r"].task == expected.split("/")[0]

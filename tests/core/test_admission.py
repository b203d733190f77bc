"""The one judge of requests, without an engine."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core import task as tasks
from vllm_kvcompress.core.admission import Admission, logger
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
        (request({"kv_pin": [0, 2001]}), SkipReason.INVALID_OPTIONS),
        (request({"kv_compression": "snapkv", "kv_task": "auto"}), SkipReason.INVALID_OPTIONS),
    ],
)
def test_what_is_not_compressed_is_counted_once(arrives: Any, reason: str) -> None:
    judge = admission()
    judge.admit(arrives)
    assert judge.stats.uncompressed == {reason: 1}
    assert not judge.planner.setups_of(["r"])
    assert judge.planner.requests["r"].prompt_len == arrives.num_prompt_tokens
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
    judge, arrives = admission("windowkv", classified), request(extra)
    judge.classifier = SimpleNamespace(  # type: ignore[assignment]
        classify=lambda asked: classified if asked is arrives else "nobody's"
    )
    judge.admit(arrives)
    assert judge.stats.tasks == {expected: 1}
    (setup,) = judge.planner.setups_of(["r"]).values()
    assert setup.config.task == judge.planner.requests["r"].task == expected.split("/")[0]


def test_the_classifier_reads_prompts_by_the_servers_tokenizer(monkeypatch: Any) -> None:
    """Here one with a token for each character."""
    model, loaded = SimpleNamespace(skip_tokenizer_init=False), list[Any]()

    def load(model_config: Any) -> Any:
        loaded.append(model_config)
        return SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))

    monkeypatch.setattr(tasks, "cached_tokenizer_from_config", load)
    planner = Planner(parse_config("windowkv"), num_layer_groups=2, block_size=32)
    server: Any = SimpleNamespace(model_config=model)
    judge, arrives = Admission(planner, server, 4096, CompressionStats()), request()
    text = "Write a one-page summary of the report.\n\n" + "The tower was built. " * 90
    arrives.prompt_token_ids, arrives.mm_features = [*map(ord, text)], []
    judge.admit(arrives)
    assert loaded == [model] and judge.stats.tasks == {"aggregation/classifier": 1}


def test_a_setting_that_does_not_fit_the_model_is_refused(monkeypatch: Any) -> None:
    """A model with latent attention has one cache for all heads; the named setting has many."""
    judge, told = admission(), list[str]()
    model = SimpleNamespace(
        use_mla=True, model="latent", max_model_len=4096,
        hf_text_config=SimpleNamespace(num_hidden_layers=4),
    )  # fmt: skip
    parallel = SimpleNamespace(pipeline_parallel_size=1)
    judge.vllm_config = SimpleNamespace(model_config=model, parallel_config=parallel)
    monkeypatch.setattr(logger, "warning", lambda text, *words: told.append(text % words))
    judge.admit(request({"kv_budget_tokens": 600}))
    assert not told, "the server's own setting has been checked"
    judge.admit(request({"kv_compression": "adakv"}))
    (text,) = told
    assert "request r is served uncompressed" in text and "(ConfigError: " in text
    assert "adakv shares a budget out between KV heads, and latent caches" in text
    assert judge.stats.uncompressed == {SkipReason.INVALID_OPTIONS: 1}


def test_a_request_without_sampling_parameters_runs_under_the_servers_setting() -> None:
    judge, arrives = admission(), request()
    arrives.sampling_params = None
    judge.admit(arrives)
    assert judge.planner.requests["r"].phase is Phase.ARMED

"""Our families in a registry: labels, values from the start, counts that add up."""

from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from vllm_kvcompress.host.prometheus import (
    COUNTERS,
    PREFIX_OUTCOMES,
    PREFIX_REASONS,
    SESSION_OUTCOMES,
    SESSION_REASONS,
    SKIP_REASONS,
    PrometheusRecorder,
)
from vllm_kvcompress.messages import post_counts
from vllm_kvcompress.metrics import MAX_SAMPLES, CompressionStats


@pytest.fixture
def recorder() -> Iterator[PrometheusRecorder]:
    """Of two engines; removed from the process's registry afterwards."""
    unregister_vllm_metrics()  # of an engine that ran in this process before
    made = PrometheusRecorder("m", [0, 1], ["snapkv"], 2)
    yield made
    for each in (*made.counters.values(), made.kept_ratio, made.seconds):
        REGISTRY.unregister(each)


def value(name: str, engine: str = "0", **labels: str) -> float | None:
    labels = {"model_name": "m", "engine": engine, **labels}
    return REGISTRY.get_sample_value(f"vllm:kv_compression_{name}", labels)


def test_known_values_are_zero_before_anything_happens(recorder) -> None:
    for engine in "01":
        assert value("requests_total", engine, policy="snapkv") == 0
        assert value("tokens_evicted_total", engine, policy="snapkv", layer_group="1") == 0
        assert value("compactions_total", engine, policy="snapkv", trigger="decode") == 0
        assert value("deferrals_total", engine) == 0
        assert value("kept_ratio_count", engine, policy="snapkv") == 0
        assert value("time_seconds_count", engine) == 0
        for reason in SKIP_REASONS:
            assert value("uncompressed_requests_total", engine, reason=reason) == 0
    for name in COUNTERS:
        assert list(recorder.counters[name].collect()[0].samples), name


def test_a_snapshot_is_added_to_its_engine(recorder) -> None:
    stats = CompressionStats()
    stats.record_compaction("keydiff", "prompt", [64, 32], 0.25, 4, 3, first=True)
    stats.record_compaction("keydiff", "decode", [64, 0], 0.25, 1, 9, first=False)
    stats.record_view("keydiff", 100, "refresh")
    stats.record_view_given_up("keydiff")
    stats.record_task("aggregation", "config")
    stats.record_uncompressed("shared_prompt")
    stats.record_codebooks([(10, 4, 2, 0.5), (10, 5, 0, 0.0)])
    stats.deferrals = 3
    stats.seconds.append(0.5)
    for _ in range(2):
        snapshot = stats.snapshot()
        assert snapshot is not None
        recorder.record(snapshot, 1)
    of = {"engine": "1", "policy": "keydiff"}
    assert value("requests_total", **of) == 2
    assert value("blocks_taken_total", **of) == 10
    assert value("blocks_returned_total", **of) == 24, "less than was taken is counted as it is"
    assert value("tokens_evicted_total", layer_group="0", **of) == 256
    assert value("compactions_total", trigger="decode", **of) == 2
    assert value("views_total", trigger="refresh", **of) == 2
    assert value("view_tokens_total", **of) == 200
    assert value("views_given_up_total", **of) == 2
    assert value("tasks_total", "1", task="aggregation", decided_by="config") == 2
    assert value("uncompressed_requests_total", "1", reason="shared_prompt") == 2
    assert value("codebook_forced_distance_total", "1", kind="key") == 1
    assert value("deferrals_total", "1") == 6
    assert value("kept_ratio_count", **of) == 4
    assert value("time_seconds_sum", "1") == 1
    assert value("requests_total", "0", policy="keydiff") is None


def test_every_count_has_a_family() -> None:
    sources = {family.source for family in COUNTERS.values()}
    others = {"codebooks", "kept_ratios", "seconds"}
    assert vars(CompressionStats()).keys() <= sources | others


def test_the_reasons_are_those_of_the_scheduler() -> None:
    from vllm_kvcompress.core.kept_cache import Outcome, Reason
    from vllm_kvcompress.core.shared_prefixes import PrefixOutcome
    from vllm_kvcompress.core.tracked_request import SkipReason

    found = {value for key, value in vars(SkipReason).items() if not key.startswith("_")}
    assert found == set(SKIP_REASONS)
    outcomes = (Outcome, SESSION_OUTCOMES), (PrefixOutcome, PREFIX_OUTCOMES)
    for values, known in (*outcomes, (Reason, SESSION_REASONS)):
        found = {value for key, value in vars(values).items() if not key.startswith("_")}
        assert found == set(known)
    assert set(PREFIX_REASONS) < set(SESSION_REASONS)


def test_counts_do_not_grow_with_requests() -> None:
    """Where vLLM's statistics are off, the default of `LLM`, nobody ever takes them."""
    stats = CompressionStats()
    for _ in range(3 * MAX_SAMPLES):
        stats.record_compaction("snapkv", "prompt", [32], 0.5, 1, 2, first=True)
        stats.seconds.append(0.1)
    sizes = [len(found) for found in vars(stats).values() if hasattr(found, "__len__")]
    assert max(sizes) == MAX_SAMPLES
    stats.clear()
    assert stats == CompressionStats() and stats.snapshot() is None


def test_counts_that_cannot_be_added_end_nothing(monkeypatch) -> None:
    """The task that ends with whatever is raised here hands out every answer."""
    from types import SimpleNamespace

    from vllm_kvcompress.host import hooks

    def fails(*_: object) -> None:
        raise KeyError("another label")

    seen: list[object] = []
    record = hooks._record(lambda *args: seen.append(args[1]))
    stats = SimpleNamespace()
    counted = CompressionStats()
    counted.record_failure("error")
    post_counts(stats, counted)
    manager = SimpleNamespace(**{hooks._RECORDER: SimpleNamespace(record=fails)})
    record(manager, stats, None)
    assert seen == [stats] and stats.kv_connector_stats is None

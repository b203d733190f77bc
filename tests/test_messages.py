"""Mail arrives as it was sent, through what vLLM sends its own by."""

import pickle
from types import SimpleNamespace

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.messages import RequestSetup, StepPlan, StepReport, post_counts, take_counts
from vllm_kvcompress.metrics import CompressionStats


def test_a_steps_plan_is_pickled_with_its_carrier() -> None:
    """Workers of other ranks get it through shared memory."""
    config = parse_config({"preset": "snapkv", "pinned": [[0, 9]]})
    assert config is not None
    plan = StepPlan(setups={"r": RequestSetup(config, (600,))}, query_slots={"r": 3})
    output = SimpleNamespace()
    plan.attach(output)
    assert len(vars(output)) == 1, "one attribute"
    found = StepPlan.of(pickle.loads(pickle.dumps(output)))
    assert found == plan and found.setups["r"].config.build_policy() is not None
    assert StepPlan.of(SimpleNamespace()) == StepPlan()


def test_a_report_is_counted_once_and_nothing_is_sent_without_news() -> None:
    output, stats = SimpleNamespace(), CompressionStats()
    StepReport().attach(output)
    assert not vars(output)
    StepReport.of(output).count_into(stats)
    assert stats == CompressionStats()
    StepReport((0.5, 0.25), [[10, 4, 2, 0.5], [10, 5, 0, 0.0]]).attach(output)
    assert len(vars(output)) == 1, "one attribute"
    StepReport.of(pickle.loads(pickle.dumps(output))).count_into(stats)
    assert list(stats.seconds) == [0.5, 0.25]
    assert stats.codebooks["key/vectors"] == 10 and stats.codebooks["value/entries"] == 5


@pytest.mark.parametrize(
    "report",
    [
        StepReport(seconds=(0.5,)),
        StepReport(codebooks=[[10, 4, 2, 0.5], [10, 5, 0, 0.0]]),
        StepReport(failed={"r": "it went wrong"}),
        StepReport(drafts_failed={"r": "it went wrong"}),
    ],
)
def test_each_kind_of_news_is_sent(report: StepReport) -> None:
    output, stats = SimpleNamespace(), CompressionStats()
    report.attach(output)
    assert StepReport.of(output) is report
    for _ in range(2):
        report.count_into(stats)
    assert list(stats.seconds) == 2 * list(report.seconds)
    assert bool(stats.codebooks) == bool(report.codebooks)


@pytest.mark.parametrize("others", [None, {"connector": {}}])
def test_counts_are_taken_out_before_vllm_looks(others: dict | None) -> None:
    stats, mail = CompressionStats(deferrals=2), SimpleNamespace(kv_connector_stats=others)
    assert take_counts(mail) is None and mail.kv_connector_stats == others
    post_counts(mail, stats)
    assert stats == CompressionStats(), "counted once"
    assert take_counts(mail) == {"deferrals": 2}
    assert mail.kv_connector_stats is None and take_counts(mail) is None
    assert take_counts(None) is None, "vLLM's statistics are off"
    post_counts(mail, stats)
    assert mail.kv_connector_stats is None, "nothing was counted"

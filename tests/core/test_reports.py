"""A compaction is for others once all steps that it was part of are through."""

from vllm_kvcompress.core.reports import Reports


def test_a_request_is_complete_when_its_last_step_is_through() -> None:
    reports = Reports()
    assert reports.is_complete("r")
    reports.note_planned(["r", "other"])
    reports.note_planned(["r"])
    reports.note_planned(["r"])
    for _ in range(2):
        reports.note_reported(["r"])
        assert not reports.is_complete("r")
    reports.note_reported(["r"])
    assert reports.is_complete("r") and not reports.is_complete("other")
    reports.note_planned(["r"])
    assert not reports.is_complete("r"), "the next one counts anew"

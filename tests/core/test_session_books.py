"""What a conversation may neither read nor keep, in vLLM's own schedulers, without a model."""

from typing import Any

import pytest

from tests.core.test_scheduler_loop import LOOPS, STOP, prompt
from tests.core.test_sessions import CHAT, EVERYWHERE, Chats
from tests.core.watched_loop import watch
from vllm_kvcompress.core.kept_cache import Outcome


@pytest.mark.parametrize(
    ("field", "value"),
    [("mm_features", ["an image"]), ("skip_reading_prefix_cache", True)],
    ids=["image", "prompt_logprobs"],
)
def test_what_must_compute_its_prompt_reads_no_earlier_turn(
    field: str, value: Any, probe_model: str
) -> None:
    """Tokens do not say which image, and logprobs of the prompt need every token computed."""
    chats = watch(Chats(probe_model, *LOOPS["sync"], 200))
    text = chats.ask("first", prompt(200))
    request = chats.add("second", [*text, *prompt(60, 3)], 8, CHAT)
    tracked, find = chats.scheduler.planner.requests["second"], chats.scheduler.reuse.find
    usual = getattr(request, field)
    setattr(request, field, value)
    assert find(request, 0) is None
    assert tracked.session_outcome == Outcome.UNSERVED
    setattr(request, field, usual)
    assert find(request, 0) is not None, "nothing else was in its way"
    assert tracked.session_outcome == Outcome.REUSED


@pytest.mark.parametrize("is_reported", [False, True])
def test_a_cache_whose_last_compaction_saw_more_than_its_text_is_not_kept(
    is_reported: bool, probe_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a token was the last is known once the step behind it compacts at that length.

    Its report is not in by then; lengths alone say it, too.
    """
    chats = watch(Chats(probe_model, *LOOPS["async"], 200, setting=EVERYWHERE))
    if is_reported:
        reports = chats.scheduler.compactions.reports
        monkeypatch.setattr(reports, "is_complete", lambda name: True)
    planner, compactions = chats.scheduler.planner, chats.scheduler.compactions
    usual, stopped = chats._tokens, set()

    def tokens(name: str, output: Any) -> list[int]:
        is_late = compactions.is_planned(name) and planner.requests[name].compaction.compacted_at
        if name == "second" or not is_late:
            return usual(name, output)
        stopped.add(name)
        return [STOP]

    chats._tokens = tokens  # type: ignore[method-assign]
    text = chats.ask("first", prompt(200), 60)
    assert stopped and not chats.stats.sessions_kept
    assert chats.pool.get_num_free_blocks() == chats.usable
    chats.ask("second", [*text, *prompt(60, 3)], 8)
    assert chats.stats.session_requests == {"nothing_kept": 2} and chats.stats.sessions_kept == 1

"""How many tokens a step computes of a request, and which of them count: no engine."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.core.test_scheduler_loop import LOOPS, NUM_DRAFTS, Loop
from tests.inside import scheduler_of
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.query_slots import QuerySlots
from vllm_kvcompress.core.scheduler import num_unverified
from vllm_kvcompress.core.tracked_request import Phase
from vllm_kvcompress.kernels.codebook.format import codes_per_row
from vllm_kvcompress.metrics import CompressionStats
from vllm_kvcompress.request_options import parse_request

SETTING = {"preset": "keydiff", "budget": {"tokens": 32, "floor": 1}, "min_prompt_len": 0}
ENDS = (100, {"trigger": "end_of_prompt"})
DECODES = (60, {"trigger": "interval", "interval": 40})
INSIDE = (148, {"trigger": "prompt", "prompt_interval": 48})
WAITING, RUNNING = RequestStatus.WAITING, RequestStatus.RUNNING


def request(num_tokens: int, status: RequestStatus = RUNNING, placeholders: int = 0) -> Any:
    return SimpleNamespace(
        request_id="r", num_tokens=num_tokens, status=status, num_output_placeholders=placeholders
    )


class Part:
    """Clips and holds as it is told, and notes what it was asked."""

    def __init__(self, answer: int) -> None:
        self.answer, self.asked = answer, list[tuple[Any, ...]]()

    def __call__(self, asked: Any, *numbers: int) -> int:
        self.asked.append((asked.request_id, *numbers))
        return self.answer


def scheduler(prompt_len: int, fields: dict[str, Any], reserve: Any = None) -> Any:
    config = parse_config({**SETTING, **fields})
    assert config is not None
    planner = Planner(config, 1, block_size=16, rations_queries=True)
    planner.add("r", prompt_len, parse_request(None))
    room = SimpleNamespace(clip=Part(7), reserve=reserve, num_free=11)
    return scheduler_of(
        [], planner=planner, query_slots=QuerySlots(planner, 0, CompressionStats()),
        compactions=SimpleNamespace(room=room, guarded=lambda name: nullcontext()),
        num_prefill_lookahead=0,
    )  # fmt: skip


@pytest.mark.parametrize(("placeholders", "num_unverified_then"), [(0, 0), (1, 0), (2, 1), (4, 3)])
def test_one_token_of_a_step_under_way_is_certain(
    placeholders: int, num_unverified_then: int
) -> None:
    assert num_unverified(request(100, placeholders=placeholders)) == num_unverified_then


@pytest.mark.parametrize(
    ("placeholders", "num_ahead", "num_certain"),
    [
        (0, 0, 108),  # without asynchronous scheduling
        (0, 3, 105),
        (2, 0, 108),  # a token of this step, and one of the step under way
        (8, 3, 102),  # each with three drafts
        (5, 3, 105),  # the step under way verifies none
        (5, 0, 105),  # this one verifies none
    ],
)
def test_what_awaits_its_verdict_does_not_count(
    placeholders: int, num_ahead: int, num_certain: int
) -> None:
    found, told = scheduler(*ENDS), list[tuple[str, int]]()

    def note(name: str, number: int) -> bool:
        told.append((name, number))
        return True

    found.planner = SimpleNamespace(note_progress=note)
    each = request(109, placeholders=placeholders)
    each.num_computed_tokens = 108
    assert found._is_due(each, num_ahead)
    assert told == [("r", num_certain)]


@pytest.mark.parametrize(
    ("setting", "num_tokens", "status", "placeholders", "step", "expected"),
    [
        (ENDS, 130, WAITING, 0, (64, 36), 36),
        (ENDS, 130, WAITING, 0, (64, 66), 36),  # resumed: up to its prompt's end
        (ENDS, 100, WAITING, 0, (64, 64), 64),  # padded by the host, which relies on it
        (ENDS, 100, RUNNING, 0, (64, 64), 35),  # what is drafted must not end the step
        (DECODES, 99, RUNNING, 1, (98, 2), 2),  # the placeholder's token is certain
        (DECODES, 98, RUNNING, 0, (98, 2), 1),
        (DECODES, 99, RUNNING, 3, (99, 1), 0),  # two await their verdict
        (DECODES, 99, RUNNING, 3, (50, 1), 1),
    ],
)
def test_a_step_ends_where_a_compaction_falls_due(
    setting: tuple[int, dict[str, Any]], num_tokens: int, status: RequestStatus,
    placeholders: int, step: tuple[int, int], expected: int,
) -> None:  # fmt: skip
    each = request(num_tokens, status, placeholders)
    reserve = SimpleNamespace(hold=Part(3))
    for known in (None, reserve):
        found = scheduler(*setting, known)
        clipped = found._reserve_prefill_lookahead(each, *step)
        is_far = found.planner.requests["r"].is_undisturbed(sum(step))
        assert clipped == (expected if known is None or is_far else 3)
        assert not found.compactions.room.clip.asked
    certain = step[0] - max(placeholders - 1, 0)
    assert reserve.hold.asked == ([] if is_far else [("r", certain, expected, 11)])
    each.request_id = "nobody"
    assert found._reserve_prefill_lookahead(each, *step) == step[1]


@pytest.mark.parametrize(("num_new", "expected"), [(1, 1), (2, 7), (60, 7)])
def test_a_step_is_clipped_to_free_blocks_where_a_compaction_waits_for_others(
    num_new: int, expected: int
) -> None:
    found = scheduler(*INSIDE)
    tracked = found.planner.requests["r"]
    assert tracked.marks == (52, 100, 148)
    tracked.phase, tracked.is_shared = Phase.DUE, True
    assert found._reserve_prefill_lookahead(request(200), 52, num_new) == expected
    asked = found.compactions.room.clip.asked
    assert asked == ([] if num_new == 1 else [("r", 52, min(num_new, 48))])


def test_the_parts_of_a_scheduler_know_the_engines_numbers(probe_model: str) -> None:
    setting = {**SETTING, "trigger": "pressure", "pressure": {"when": 0.5, "until": 0.25}}
    for kind, num_drafts in LOOPS.values():
        loop = Loop(probe_model, kind, num_drafts, num_blocks=41, setting=setting, window=32)
        found = loop.scheduler
        assert found.planner.num_lookahead == num_drafts in (0, NUM_DRAFTS)
        assert found.planner.rations_queries
        assert found.planner.codes_per_row == codes_per_row(8 * 4)  # of a head in float32
        assert found.longest.num_usable == 40
        assert (found.pressure._num_kept_free, found._managers[2]._num_ahead) == (0, 0)
        found.vllm_config.scheduler_config.async_scheduling = True
        assert found._groups()[2]._num_ahead == 1, "a step under way, while another is scheduled"

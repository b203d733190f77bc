"""What a step takes from the pool for its requests, and what the next one commits: no engine."""

import zlib
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from tests.core.test_block_manager import BLOCK, spec
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.core.compactions import Compactions
from vllm_kvcompress.core.host_groups import HostGroup
from vllm_kvcompress.core.kept_cache import Kept, Kind, Place, tokens_of
from vllm_kvcompress.core.kept_store import KeptCaches
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.tracked_request import CompactionSchedule, Phase
from vllm_kvcompress.lengths.budgets import forced_ranges
from vllm_kvcompress.metrics import CompressionStats
from vllm_kvcompress.plans import Purpose, RequestOptions

SETTING: dict[str, Any] = {
    "preset": "keydiff", "budget": {"tokens": 3 * BLOCK, "floor": 1}, "min_prompt_len": 0,
    "num_sink_tokens": 0, "observation_window": 1,
}  # fmt: skip
BOTH = {"trigger": "both", "interval": 2 * BLOCK}
ALONE = {"mode": "draft", "draft": {"tokens": 4}}
PYRAMID = {"layer_budget": {"shape": "pyramid"}, "layer_groups": {"count": 2}}
BESIDE = {"draft": {"tokens": 4, "budget": {"tokens": BLOCK, "floor": 1}}}


class Step:
    """Request "r" of ten blocks in each of two groups, due to keep three, and a windowed group."""

    def __init__(self, num_free: int, num_sharers: int = 0, **more: Any) -> None:
        self.pool = BlockPool(1 + 20 + 10 + num_free, enable_caching=False, hash_block_size=BLOCK)
        common = {"block_pool": self.pool, "enable_caching": False, "scheduler_block_size": BLOCK}
        windowed = SlidingWindowSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=32
        )
        host = SlidingWindowManager(
            windowed, kv_cache_group_id=2, max_admission_blocks_per_request=10, **common
        )
        own = [
            CompressedAttentionManager(spec(number), kv_cache_group_id=number, **common)
            for number in range(2)
        ]
        self.managers: list[Any] = [*own, HostGroup(host, 0)]
        config = parse_config({**SETTING, **more})
        assert config is not None
        self.planner, self.stats = Planner(config, 2, BLOCK), CompressionStats()
        self.compactions = Compactions(
            self.planner, self.managers, [0, 1, None], self.pool, 4096, self.stats
        )
        for manager in (*own, host):
            manager.allocate_new_blocks("r", 10 * BLOCK, 10 * BLOCK)
        for number in range(num_sharers):
            for manager in own:
                self.pool.touch(manager.req_to_blocks["r"])
                manager.req_to_blocks[f"s{number}"] = list(manager.req_to_blocks["r"])
        self.tracked = self.planner.add("r", 10 * BLOCK, RequestOptions())
        self.request: Any = SimpleNamespace(
            request_id="r", prompt_token_ids=list(range(10 * BLOCK)), num_prompt_tokens=10 * BLOCK,
            max_tokens=50, num_preemptions=0,
        )  # fmt: skip
        assert self.planner.note_progress("r", 10 * BLOCK)

    @property
    def num_free(self) -> int:
        return self.pool.get_num_free_blocks()

    def plan(self) -> list[Any]:
        return self.compactions.plan([self.request])


def test_a_plan_says_what_the_worker_needs_and_its_commit_is_counted() -> None:
    step = Step(8, **BOTH)
    (plan,) = step.plan()
    assert (plan.request_id, plan.position, plan.while_decoding) == ("r", 10 * BLOCK, False)
    assert plan.purpose is Purpose.EVICT
    assert plan.seed == zlib.crc32(array("q", range(10 * BLOCK)).tobytes())
    for number, group in enumerate(plan.groups[:2]):
        assert (group.lengths.region_len, group.lengths.kept_len) == (10 * BLOCK, 3 * BLOCK)
        assert group.cache.num_tokens == 10 * BLOCK and not group.in_place
        assert group.forced == forced_ranges(group.cache, 1)
        blocks = step.managers[number].req_to_blocks["r"]
        assert list(group.source_blocks) == [block.block_id for block in blocks]
    assert plan.groups[2] is None
    assert step.compactions.is_planned("r") and not step.compactions.is_planned("other")
    assert step.num_free == 8 - 6 and step.tracked.phase is Phase.PLANNED
    step.compactions.commit()
    assert step.num_free == 8 - 6 + 20 and not step.compactions.is_planned("r")
    assert [dict(each.evicted) for each in step.managers] == [{"r": 7 * BLOCK}] * 2 + [{}]
    assert all("r" in each.lossy for each in step.managers), "windowed layers read what is above"
    assert step.tracked.compaction.compacted_at == 10 * BLOCK
    assert step.stats.requests == {"keydiff": 1}
    for manager in step.managers[:2]:
        manager.allocate_new_blocks("r", 12 * BLOCK, 12 * BLOCK)
    assert step.planner.note_progress("r", 12 * BLOCK)
    (plan,) = step.plan()
    assert (plan.position, plan.while_decoding) == (12 * BLOCK, True)
    step.compactions.commit()
    stats = step.stats
    assert stats.requests == {"keydiff": 1}
    assert stats.compactions == {"keydiff/prompt": 1, "keydiff/decode": 1}
    assert stats.tokens_evicted == {"keydiff/0": 9 * BLOCK, "keydiff/1": 9 * BLOCK}
    assert stats.blocks_taken == {"keydiff": 6 + 6}
    assert stats.blocks_returned == {"keydiff": 20 + 10}
    assert list(stats.kept_ratios) == [("keydiff", 3 / 10), ("keydiff", 3 / 12)]


@pytest.mark.parametrize(
    ("num_free", "in_place"),
    [(5, [True, False]), (4, [True, False]), (2, [True, True]), (0, [True, True])],
)
def test_blocks_that_are_overwritten_are_not_counted_as_taken(
    num_free: int, in_place: list[bool]
) -> None:
    step = Step(num_free)
    (plan,) = step.plan()
    assert [group.in_place for group in plan.groups[:2]] == in_place
    step.compactions.commit()
    assert step.stats.blocks_taken == {"keydiff": num_free}
    assert step.stats.blocks_returned == {"keydiff": 20 - (6 - num_free)}
    assert step.num_free == 20 - 6 + num_free


@pytest.mark.parametrize("promised_to", ["r", "other"])
def test_who_reads_what_an_equal_one_has_kept_takes_no_blocks(
    promised_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(3 + 3)
    promised = [step.pool.get_new_blocks(3) for _ in range(2)]
    for manager, blocks in zip(step.managers[:2], promised, strict=True):
        manager.promised["r"] = blocks
    monkeypatch.setattr(step.compactions.equal, "reads", promised_to.__eq__)
    (plan,) = step.plan()
    assert (plan.purpose is Purpose.ADOPT) is (promised_to == "r")
    assert [group.in_place for group in plan.groups[:2]] == [promised_to != "r"] * 2
    if promised_to == "r":
        found = [list(group.destination_blocks) for group in plan.groups[:2]]
        assert found == [[block.block_id for block in blocks] for blocks in promised]
        assert step.num_free == 0 and step.tracked.phase is Phase.PLANNED
        step.compactions.commit()
        assert step.num_free == 20 and step.stats.blocks_taken == {"keydiff": 0}


def test_every_group_is_admitted_with_the_most_that_it_will_hold() -> None:
    step = Step(8, trigger="prompt", prompt_interval=4 * BLOCK, **PYRAMID)
    held = [manager.most_held("r", 12 * BLOCK) for manager in step.managers[:2]]
    assert held == [step.planner.most_held(number, "r", 12 * BLOCK) for number in range(2)]
    assert 12 * BLOCK > held[0] > held[1], "the pyramid's lower layers keep more"


@pytest.mark.parametrize("num_more", [None, 0, 40])
def test_the_seed_is_of_the_tokens_that_are_compressed(num_more: int | None) -> None:
    """A prefix that others have, too, goes on differently; embeddings have no tokens."""
    step = Step(8)
    text = None if num_more is None else list(range(10 * BLOCK + num_more))
    step.request.prompt_token_ids = text
    expected = 0 if text is None else zlib.crc32(array("q", range(10 * BLOCK)).tobytes())
    assert step.plan()[0].seed == expected


def test_a_group_that_keeps_everything_has_no_plan() -> None:
    step = Step(3)
    step.tracked.compaction.lengths[0] = None
    (plan,) = step.plan()
    assert [group is None for group in plan.groups] == [True, False, True]
    step.compactions.commit()
    assert step.num_free == 3 - 3 + 10
    assert step.stats.tokens_evicted == {"keydiff/0": 0, "keydiff/1": 7 * BLOCK}
    assert list(step.stats.kept_ratios) == [("keydiff", 13 / 20)]


def test_who_shares_its_blocks_waits_or_starts_over() -> None:
    step = Step(8, num_sharers=1)
    assert step.plan() == [] and step.tracked.is_shared and step.tracked.phase is Phase.DUE
    assert step.stats.deferrals == 0 and step.compactions.take_starved() == []
    step = Step(5, num_sharers=1, shared_blocks="always")
    assert step.plan() == [] and step.stats.deferrals == 1 and not step.tracked.is_shared
    assert step.compactions.take_starved() == ["r"] and step.compactions.take_starved() == []
    assert step.num_free == 5 and not step.compactions.is_planned("r")
    assert step.plan() == [] and step.stats.deferrals == 2, "in every step"
    step = Step(6, num_sharers=1, shared_blocks="always")
    assert len(step.plan()) == 1 and step.compactions.take_starved() == []


@pytest.mark.parametrize(
    ("num_free", "num_preemptions", "max_tokens", "is_taken"),
    [
        (6, 0, 50, True),
        (5, 0, 50, False),
        (6 + 3 * 4, 1, 50, True),
        (6 + 3 * 4 - 1, 1, 50, False),
        (6 + 2 * 246 + 10, 1, 10**6, True),  # to the longest sequence; a window of ten blocks
        (6 + 2 * 246 + 9, 1, 10**6, False),
    ],
)
def test_a_view_is_taken_where_nobody_is_preempted_for_it(
    num_free: int, num_preemptions: int, max_tokens: int, is_taken: bool
) -> None:
    step = Step(num_free, **ALONE)
    step.request.num_preemptions, step.request.max_tokens = num_preemptions, max_tokens
    plans = step.plan()
    assert [plan.purpose for plan in plans] == [Purpose.COPIED_VIEW] * is_taken
    assert not any(group.in_place for plan in plans for group in plan.groups[:2])
    assert step.stats.deferrals == (not is_taken) and step.compactions.take_starved() == []
    if not is_taken:
        return
    step.compactions.commit()
    assert [len(each.views.get("r", ())) for each in step.managers] == [3, 3, 0]
    assert step.stats.views == {"keydiff/prompt": 1}
    assert step.stats.view_tokens == {"keydiff": 3 * BLOCK}
    assert not step.stats.compactions and step.num_free == num_free - 6
    room = step.compactions.room
    assert room.make_free(num_free) and not room.make_free(num_free + 1)
    assert step.stats.views_given_up == {"keydiff": 1} and step.tracked.view.drafts is None
    assert step.compactions.take_given_up() == ("r",) and step.compactions.take_given_up() == ()


def set_aside(step: Step, num_aside: int) -> None:
    """For others; and one block for the request itself."""
    num_blocks = lambda joining=None, without=None: num_aside + (without != "r")  # noqa: E731
    note = lambda *_: None  # noqa: E731
    step.compactions.room.reserve = SimpleNamespace(  # type: ignore[assignment]
        num_blocks=num_blocks, note_change=note, begin_step=note
    )


@pytest.mark.parametrize(
    ("purpose", "num_free", "is_taken"),
    [
        (Purpose.COPIED_VIEW, 6 + 3, True),
        (Purpose.COPIED_VIEW, 6 + 2, False),
        (Purpose.LINKED_VIEW, 0, True),  # of the request's own blocks
    ],
)
def test_a_view_leaves_what_is_set_aside(purpose: Purpose, num_free: int, is_taken: bool) -> None:
    step = Step(num_free, **ALONE)
    set_aside(step, 2)
    step.tracked.view.purpose = purpose
    assert [plan.purpose for plan in step.plan()] == [purpose] * is_taken
    assert step.compactions.take_starved() == [], "nobody starts over for a view"


def test_a_view_of_blocks_that_are_there_is_not_given_up_for_others() -> None:
    step = Step(6, **ALONE)
    step.plan()
    step.compactions.commit()
    newest = step.planner.add("newest", 10 * BLOCK, RequestOptions())
    newest.view.purpose, newest.phase = Purpose.LINKED_VIEW, Phase.DONE
    newest.view.start(10 * BLOCK)
    assert step.num_free == 0 and step.compactions.room.make_free(1)
    assert step.compactions.take_given_up() == ("r",) and newest.view.drafts is not None


def test_views_are_counted_by_their_tokens_and_by_what_asked_for_them() -> None:
    step = Step(20, mode="draft", draft={"tokens": 4, "refresh_every": 2 * BLOCK})
    step.tracked.view.lengths[0] = None
    step.plan()
    step.compactions.commit()
    assert step.stats.view_tokens == {"keydiff": (10 + 3) * BLOCK // 2}
    assert isinstance(step.stats.view_tokens["keydiff"], int)
    for manager in step.managers[:2]:
        manager.allocate_new_blocks("r", 12 * BLOCK, 12 * BLOCK)
    assert step.planner.note_progress("r", 12 * BLOCK)
    step.plan()
    room = step.compactions.room
    assert not room.make_free(room.num_free + 1), "the step reads it while it takes the next one"
    step.compactions.commit()
    assert step.stats.views == {"keydiff/prompt": 1, "keydiff/refresh": 1}


@pytest.mark.parametrize(
    ("num_free", "num_aside", "num_plans"), [(8, 0, 2), (7, 0, 1), (10, 2, 2), (9, 2, 1)]
)
def test_an_eviction_does_not_wait_for_its_view(
    num_free: int, num_aside: int, num_plans: int
) -> None:
    step = Step(num_free, **BESIDE)
    if num_aside:
        set_aside(step, num_aside)
    plans = step.plan()
    assert [each.purpose for each in plans] == [Purpose.EVICT, Purpose.COPIED_VIEW][:num_plans]
    step.compactions.commit()
    assert [len(each.views.get("r", ())) for each in step.managers[:2]] == [num_plans - 1] * 2
    assert step.stats.compactions == {"keydiff/prompt": 1}
    assert step.stats.view_tokens == ({"keydiff": BLOCK} if num_plans == 2 else {})


def test_what_a_request_that_ends_is_kept_for_is_committed_at_once() -> None:
    step = Step(8)
    assert step.compactions.settle("r", 0), "nothing is under way"
    step.plan()
    assert not step.compactions.settle("r", 10 * BLOCK - 1), "it has seen more than is to be kept"
    assert step.compactions.is_planned("r")
    assert step.compactions.settle("r", 10 * BLOCK) and not step.compactions.is_planned("r")
    assert step.num_free == 8 - 6 + 20 and step.tracked.phase is Phase.DONE
    step.compactions.commit()
    assert step.stats.compactions == {"keydiff/prompt": 1}


def test_nothing_is_committed_of_a_request_that_is_gone() -> None:
    step = Step(8)
    step.plan()
    for manager in step.managers[:2]:
        manager.free("r")
    step.managers[2].mark_lossy("r")
    step.compactions.forget("r")
    step.planner.remove("r")
    assert not any("r" in manager.lossy for manager in step.managers)
    step.compactions.commit()
    assert not step.stats.compactions and step.num_free == 28


def test_what_is_raised_concerns_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(8)

    def fails(*args: Any) -> Any:
        raise ValueError("of a test")

    with monkeypatch.context() as patch:
        patch.setattr(step.compactions.room, "own_destinations", fails)
        assert step.plan() == []
    assert step.compactions.take_misplanned() == ["r"]
    assert step.compactions.take_misplanned() == []
    assert len(step.plan()) == 1


@pytest.mark.parametrize("is_prefix", [False, True])
def test_what_is_kept_gives_way_to_a_compaction_of_blocks_that_it_holds(is_prefix: bool) -> None:
    """Whether that would not pay, or must happen and finds no blocks, as that of a prefix."""
    step = Step(5 if is_prefix else 8)
    step.tracked.shared_len = 10 * BLOCK if is_prefix else None
    room = step.compactions.room
    room.kept = KeptCaches(step.pool, 64, step.stats, room.note_change)
    blocks = [list(manager.req_to_blocks["r"]) for manager in step.managers[:2]]
    for group in blocks:
        step.pool.touch(group)
    held, place = CompactionSchedule(compacted_at=1), Place("chat", None, None, Kind.SESSION)
    room.kept.put(place, Kept(tokens_of([1]), blocks, held, 1, step.planner.config))
    assert step.plan() == [] and step.tracked.is_shared is not is_prefix
    assert step.compactions.take_starved() == ["r"] * is_prefix, "it must not go on uncompressed"
    assert not room.kept.held_blocks()
    assert len(step.plan()) == 1

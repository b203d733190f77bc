"""Slots of the ring of queries: every compaction while decoding finds a whole window recorded."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.query_slots import QuerySlots
from vllm_kvcompress.core.tracked_request import SkipReason
from vllm_kvcompress.lengths.decode_queries import (
    MIN_SLOTS,
    RingShape,
    decode_gap,
    decode_window,
    query_bytes,
    ring_shape,
)
from vllm_kvcompress.metrics import CompressionStats
from vllm_kvcompress.request_options import parse_request

WINDOW, MAX_DRAFTS = 8, 3
SLOT_LEN = WINDOW + 2 * (MAX_DRAFTS + 1)


class World:
    """A scheduler's and a worker's part, in the order of a step, with a plain model of the ring."""

    def __init__(self, num_slots: int, interval: int, trigger: str = "both") -> None:
        config = parse_config(
            {
                "preset": "snapkv",
                "observation_window": WINDOW,
                "budget": {"tokens": 32, "floor": 1},
                "trigger": trigger,
                "interval": interval,
                "min_prompt_len": 0,
            }
        )
        self.planner = Planner(config, 1, block_size=8, rations_queries=True)
        self.stats = CompressionStats()
        self.slots = QuerySlots(self.planner, num_slots, self.stats)
        self.computed: dict[str, int] = {}
        self.ring: list[dict[int, tuple[str, int, int]]] = [{} for _ in range(num_slots)]
        self.owners: dict[str, int] = {}  # as a worker knows them
        self.attempt = 0
        self.truth: dict[tuple[str, int], int] = {}
        self.compacted: dict[str, list[int]] = {}
        self.planned: list[str] = []

    def add(self, name: str, prompt_len: int, num_cached: int = 0) -> None:
        self.planner.add(name, prompt_len, parse_request(None))
        self.computed[name], self.compacted[name] = num_cached, []

    def remove(self, name: str):
        self.slots.release(name)
        self.owners.pop(name, None)
        del self.computed[name]
        return self.planner.remove(name)

    def preempt(self, name: str) -> None:
        self.slots.release(name)
        self.owners.pop(name, None)
        self.planner.restart(name)
        self.computed[name], self.compacted[name] = 0, []

    def step(self, rows: dict[str, tuple[int, int]]) -> None:
        """Rows of (tokens wanted, how many of them are drafts that come to nothing)."""
        for name in self.planned:
            if (tracked := self.planner.planned(name)) is not None:
                self.planner.commit(tracked)
        self.planned = []
        self.slots.release_idle(lambda name: self.computed[name])
        chunks, due = {}, []
        for name, (wanted, num_rejected) in rows.items():
            start = self.computed[name]
            known = start + wanted - num_rejected
            count = self.planner.clip_chunk(name, start, wanted, known)
            count = self.slots.clip(name, start, count)
            if not count:
                continue
            num_rejected = min(num_rejected, count - 1)
            chunks[name] = start, start + count, num_rejected
        self.slots.provide((name, start, end) for name, (start, end, _) in chunks.items())
        for name, (_, end, num_rejected) in chunks.items():
            if self.planner.note_progress(name, end - num_rejected):
                due.append(name)
        self.slots.check_integrity()
        for name, slot in self.slots.take_changes().items():
            self.owners[name] = slot
        self.attempt += 1
        for name, (start, end, num_rejected) in chunks.items():
            for position in range(max(start, end - SLOT_LEN), end):
                if self.owners.get(name, -1) >= 0:
                    where = self.ring[self.owners[name]]
                    where[position % SLOT_LEN] = name, position, self.attempt
            for position in range(start, end):
                self.truth[name, position] = self.attempt
            self.computed[name] = end - num_rejected
        for name in due:
            self.compact(name)

    def compact(self, name: str) -> None:
        tracked = self.planner.requests[name]
        if tracked.position > tracked.prompt_len:
            slot = self.ring[self.owners[name]]
            for position in range(tracked.position - WINDOW, tracked.position):
                expected = name, position, self.truth[name, position]
                assert slot[position % SLOT_LEN] == expected, (name, tracked.position)
        self.compacted[name].append(tracked.position)
        self.planner.note_planned(tracked)
        self.planned.append(name)


@pytest.mark.parametrize("interval", [20, WINDOW + 1, WINDOW])
def test_with_a_slot_each_nothing_waits(interval: int) -> None:
    """Also where one window follows another."""
    world = World(3, interval)
    for number, name in enumerate("abc"):
        world.add(name, 100 + number)
    world.step(dict.fromkeys("abc", (99, 0)))
    for _ in range(70):
        world.step(dict.fromkeys("abc", (1, 0)))
    for number, name in enumerate("abc"):
        first = 100 + number
        assert world.compacted[name][:4] == [first + i * interval for i in range(4)]
    assert world.stats.deferrals == 0


@pytest.mark.parametrize("interval", [20, WINDOW + 1, WINDOW])
def test_few_slots_go_round_and_whoever_waits_is_compacted_where_it_would_be_alone(
    interval: int,
) -> None:
    world = World(1, interval)
    for name in "abcd":
        world.add(name, 60)
    world.step(dict.fromkeys("abcd", (60, 0)))
    for _ in range(200):
        world.step(dict.fromkeys("abcd", (1, 0)))
    for name in "abcd":
        # A slot serves one window after the other, with a step for each hand-over.
        assert len(world.compacted[name]) - 1 >= 200 // (4 * (WINDOW + 2))
        marks = [60 + interval * i for i in range(len(world.compacted[name]))]
        assert world.compacted[name] == marks
    assert world.stats.deferrals > 0


def test_a_slot_is_held_for_a_window_and_not_longer() -> None:
    world = World(2, interval=40)
    world.add("a", 60)
    world.step({"a": (60, 0)})
    held = []
    for _ in range(80):
        world.step({"a": (1, 0)})
        held.append("a" in world.slots.owned)
    assert sum(held) == 2 * WINDOW
    assert world.compacted["a"] == [60, 100, 140]


def test_who_waits_stands_before_the_first_token_of_its_window() -> None:
    world = World(1, interval=20, trigger="interval")
    for name in "ab":
        world.add(name, 60)
    world.step(dict.fromkeys("ab", (60, 0)))
    for _ in range(20):
        world.step(dict.fromkeys("ab", (1, 0)))
    assert (world.compacted["a"], world.compacted["b"]) == ([80], [])
    assert world.computed == {"a": 80, "b": 80 - WINDOW}
    assert world.stats.deferrals == 20 - (20 - WINDOW)
    assert world.remove("b").skip_reason == SkipReason.SHORT_OUTPUT


def test_who_finds_no_slot_computes_what_lies_before_its_window() -> None:
    """Workers are told of slots that are taken back, but for requests that are gone."""
    world = World(1, interval=20, trigger="interval")
    for name in "ab":
        world.add(name, 60)
    assert world.slots.clip("a", 60, 40) == 40
    assert world.slots.take_changes() == {"a": 0} and not world.slots.take_changes()
    assert world.slots.clip("b", 60, 12) == 12 and world.stats.deferrals == 0
    assert world.slots.clip("b", 60, 40) == 12 and world.stats.deferrals == 0
    assert world.slots.clip("b", 73, 4) == 0 and world.stats.deferrals == 1
    for num_computed, owned in ((73, {"a": 0}), (72, {})):
        world.slots.release_idle({"a": num_computed}.__getitem__)
        assert world.slots.owned == owned
    assert world.slots.take_changes() == {"a": -1}
    assert world.planner.requests["a"].queries_since is None
    assert world.slots.clip("a", 60, 40) == 12, "the other waits for longer"
    assert world.slots.clip("b", 72, 1) == 1
    world.slots.release("b")
    assert not world.slots.take_changes(), "a worker knows that it is gone"
    world.slots.release("a")
    world.slots.check_integrity()
    world.planner.remove("a")
    world.slots.check_integrity()


def test_slots_that_are_left_go_to_views_that_wait_for_most_tokens() -> None:
    config = parse_config("snapkv", {"mode": "draft", "draft": {"refresh_below": 0.5}})
    assert config is not None
    planner = Planner(config, 1, block_size=32, rations_queries=True)
    slots = QuerySlots(planner, 2, CompressionStats())
    for name in "abcd":
        planner.add(name, 2000, parse_request(None))
    ends = {"d": 1999, "a": 2001, "b": 2007, "c": 2003}
    first = planner.queries_from("a")
    assert first == 2000 - decode_window(config)
    ends["d"] = first
    slots.provide((name, end - 1, end) for name, end in ends.items())
    assert slots.take_changes() == {"b": 0, "c": 1}
    assert planner.requests["b"].queries_since == 2006
    slots.release("b")
    slots.provide([("d", first, first + 1), ("c", 2003, 2004), ("a", 2001, 2002)])
    assert slots.owned == {"c": 1, "a": 0}
    QuerySlots(planner, 0, CompressionStats()).provide([("d", first, first + 1)])


def test_a_setting_without_a_decode_trigger_takes_no_slot() -> None:
    world = World(2, interval=20, trigger="end_of_prompt")
    world.add("a", 100)
    world.step({"a": (100, 0)})
    for _ in range(60):
        world.step({"a": (1, 0)})
        assert not world.slots.owned
    assert world.compacted["a"] == [100]


STEP = st.tuples(
    st.sets(st.sampled_from("abcdef"), min_size=1),
    st.integers(1, 40),
    st.integers(0, MAX_DRAFTS),
    st.sampled_from(["", "", "", "preempt", "finish"]),
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(STEP, min_size=20, max_size=120),
    st.integers(1, 4),
    st.sampled_from([WINDOW, 13, 30]),
)
def test_whatever_happens_no_window_is_read_that_was_not_recorded(
    steps: list, num_slots: int, interval: int
) -> None:
    """Chunks, drafts that come to nothing, pauses, preemptions and ends; any number of slots."""
    world = World(num_slots, interval)
    for number, name in enumerate("abcdef"):
        world.add(name, 20 + 17 * number)
    for names, chunk, num_rejected, event in steps:
        rows = {}
        for name in sorted(names & world.computed.keys()):
            left = world.planner.requests[name].prompt_len - world.computed[name]
            rows[name] = (min(chunk, left), 0) if left > 0 else (1 + num_rejected, num_rejected)
        if rows:
            world.step(rows)
        if event and world.computed:
            name = min(world.computed)
            if event == "preempt":
                world.preempt(name)
            else:
                world.remove(name)
                world.add(name, 50)
        world.slots.check_integrity()


# --- sizes --------------------------------------------------------------------------------


def vllm_config(max_num_seqs: int, num_drafts: int = 0) -> SimpleNamespace:
    """Llama-3-8B on one rank."""
    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(num_hidden_layers=32),
        use_mla=False,
        max_model_len=131072,
        get_num_attention_heads=lambda parallel: 32 // parallel.tensor_parallel_size,
        get_head_size=lambda: 128,
        dtype=torch.bfloat16,
    )
    return SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        num_speculative_tokens=num_drafts,
    )


def ring_bytes(shape) -> int:
    return shape.num_slots * shape.slot_len * 32 * 32 * 128 * 2


def test_rkv_with_1024_requests_takes_a_quarter_of_a_gigabyte() -> None:
    """A ring for every request took 2.1 GB."""
    shape = ring_shape(vllm_config(1024), parse_config("rkv"))
    assert (shape.window, shape.slot_len, shape.num_slots) == (8, 8, 128)
    assert ring_bytes(shape) == 268_435_456


def test_snapkv_with_1024_requests_stays_within_the_limit() -> None:
    """A ring for every request took 17 GB."""
    config = parse_config("snapkv", {"trigger": "both", "observation_window": 64})
    shape = ring_shape(vllm_config(1024), config)
    assert (shape.window, shape.num_slots) == (64, 64) and isinstance(shape.num_slots, int)
    assert ring_bytes(shape) == 2**30
    server = vllm_config(1024)
    server.parallel_config.tensor_parallel_size = 4
    assert ring_shape(server, config).num_slots == 4 * 64, "a rank keeps a quarter of the heads"


def test_queries_of_latent_attention_are_as_wide_as_the_heads_have_them() -> None:
    """Of DeepSeek-V2-Lite: a head's query has 128 and 64 numbers, a cached row 576."""
    server = vllm_config(8)
    server.model_config.use_mla = True
    server.model_config.hf_text_config = SimpleNamespace(
        num_hidden_layers=27, qk_nope_head_dim=128, qk_rope_head_dim=64
    )
    assert query_bytes(server) == 27 * 32 * (128 + 64) * 2


def test_few_requests_have_a_slot_each() -> None:
    config = parse_config("snapkv", {"trigger": "both", "observation_window": 16, "interval": 32})
    assert ring_shape(vllm_config(16), config).num_slots == 16
    assert ring_shape(vllm_config(3), parse_config("rkv")).num_slots == 3
    assert ring_shape(vllm_config(64), parse_config("rkv")).num_slots == MIN_SLOTS


def test_drafts_lengthen_slots_and_no_window_needs_none() -> None:
    shape = ring_shape(vllm_config(64, num_drafts=4), parse_config("rkv"))
    assert shape.slot_len == 8 + 2 * 5
    assert ring_shape(vllm_config(64), parse_config("snapkv")) == RingShape(0, 0, 0)


def test_views_that_may_be_taken_again_at_any_time_record_always() -> None:
    fields = {"mode": "draft", "draft": {"refresh_below": 0.5}}
    config = parse_config("snapkv", fields)
    assert (decode_window(config), decode_gap(config)) == (config.observation_window, 0)
    assert ring_shape(vllm_config(32), config).num_slots == 32
    every = parse_config("snapkv", {"mode": "draft", "draft": {"refresh_every": 256}})
    assert decode_gap(every) == 256
    both = parse_config(
        "snapkv", {"mode": "draft", "draft": {**fields["draft"], "refresh_every": 9}}
    )
    assert decode_gap(both) == 0

"""Compaction every so many generated tokens: bounded memory, the same tokens however scheduled."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lab.scenarios import churn
from tests.e2e.conftest import assert_idle, opened
from tests.inside import managers, preempt
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.lengths import decode_queries
from vllm_kvcompress.request_options import parse_request, resolve_request

pytestmark = pytest.mark.engine

BUDGET, INTERVAL, BLOCK = 128, 32, 32
SETTING = {
    "preset": "snapkv",
    "policy": {"kernel_size": 13},
    "observation_window": 16,
    "budget": {"tokens": BUDGET, "floor": 1},
    "layer_groups": {"count": 2},
    "layer_budget": {"shape": "pyramid", "beta": 4},
    "trigger": "both",
    "interval": INTERVAL,
    "min_prompt_len": 0,
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
NUM_TOKENS = 100


@pytest.fixture(scope="module")
def requests(prompts) -> list[tuple[list[int], dict[str, Any] | None]]:
    """A long prompt, one far below the budget, one that is left alone."""
    return [
        (prompts[0][:700], None),
        (prompts[1][:100], None),
        (prompts[2][:300], {"kv_compression": "none"}),
    ]


def add_all(engine: Engine, requests) -> None:
    for number, (prompt, xargs) in enumerate(requests):
        engine.add(str(number), prompt, NUM_TOKENS, xargs, ignore_eos=True)


def tokens_of(engine: Engine) -> list[list[int]]:
    return [result.token_ids for result in engine.results.values()]


@pytest.fixture(scope="module")
def engine(probe_model: str) -> Iterator[Engine]:
    with opened(probe_model, SETTING) as engine:
        yield engine


@pytest.fixture(scope="module")
def run(engine: Engine, requests) -> tuple[list[list[int]], dict[tuple[str, int], list[int]]]:
    """Tokens, and tokens held per request and layer group after every step."""
    add_all(engine, requests)
    held: dict[tuple[str, int], list[int]] = defaultdict(list)
    while engine.engine.has_unfinished_requests():
        engine.step()
        engine.scheduler.check_integrity()
        for name, request in engine.live().items():
            for group, manager in enumerate(managers(engine)):
                blocks = manager.req_to_blocks[request.request_id]
                held[name, group].append(len(blocks) * BLOCK)
    assert_idle(engine)
    return tokens_of(engine), held


def test_a_long_generation_runs_in_bounded_memory(engine: Engine, run) -> None:
    _, held = run
    compactions = engine.scheduler.stats.compactions
    assert compactions["snapkv/prompt"] == 1
    assert compactions["snapkv/decode"] >= 4, "three of the first, at least one of the second"
    for (name, group), sizes in held.items():
        if name == "2":
            assert sizes[-1] >= 390, "left alone"
            continue
        budget = BUDGET * 2 if group == 0 else BUDGET
        after_prompt = sizes[2:]
        assert max(after_prompt) <= budget + INTERVAL + 2 * BLOCK, (name, group, sizes)
    assert max(held["0", 1]) >= 700, "the whole prompt was there before"


def test_the_second_request_was_compacted_for_what_it_generated(engine: Engine, run) -> None:
    """Its prompt alone is below the budget; its deeper group keeps less than its first."""
    _, held = run
    assert held["1", 1][-1] < held["1", 0][-1] < BUDGET * 2 + INTERVAL


def test_each_alone_gives_the_same_tokens(engine: Engine, run, requests) -> None:
    expected, _ = run
    prompt, xargs = requests[0]
    assert engine.generate([prompt], NUM_TOKENS, xargs, ignore_eos=True) == expected[:1]


def test_a_replay_gives_the_same_tokens(engine: Engine, run, requests, probe_model) -> None:
    """So what ``kvcompress eval`` measures of settings that compact while decoding is served."""
    replay = Replay(probe_model, BLOCK)
    server = parse_config(SETTING)
    assert server is not None
    cases = [
        (prompt, xargs, tokens) for (prompt, xargs), tokens in zip(requests, run[0], strict=True)
    ]
    rkv = {"kv_compression": "rkv", "kv_budget_ratio": 0.05}  # 64 tokens, every 128
    short = requests[1][0]  # where what is evicted changes what is said
    [tokens] = engine.generate([short], 150, rkv, ignore_eos=True)
    cases.append((short, rkv, tokens))
    for prompt, xargs, tokens in cases:
        config = resolve_request(server, parse_request(xargs))
        assert replay.generate(replay.prefill(prompt), config, len(tokens)) == tokens
    assert engine.scheduler.stats.compactions["rkv/decode"] == 1
    whole = replay.generate(replay.prefill(short), None, 150)
    assert whole[:129] == tokens[:129] and whole != tokens


def test_preempted_requests_give_the_same_tokens(probe_model, run, requests) -> None:
    """Resumed requests are compacted after the same intervals again, in chunks."""
    expected, _ = run
    with opened(probe_model, SETTING, num_blocks=1 + 2 * 34, max_model_len=1024) as engine:
        engine.add("0", requests[0][0], NUM_TOKENS, ignore_eos=True)
        for _ in range(60):
            engine.step()
        engine.add("1", requests[1][0], NUM_TOKENS, ignore_eos=True)
        engine.add("2", requests[2][0], NUM_TOKENS, {"kv_compression": "none"}, ignore_eos=True)
        request = engine.live()["0"]
        assert request.num_output_tokens > INTERVAL, "two compactions are to be repeated"
        preempt(engine, request)
        engine.drain()
        assert engine.num_preemptions > 0
        assert tokens_of(engine) == expected
        assert_idle(engine)


def test_async_scheduling_gives_the_same_tokens(probe_model, run, requests) -> None:
    expected, _ = run
    with opened(probe_model, SETTING, async_scheduling=True) as engine:
        assert engine.core.batch_queue is not None
        add_all(engine, requests)
        engine.drain()
        assert tokens_of(engine) == expected
        assert_idle(engine)
        report = churn(engine, 20, seed=7)
        assert (report.blocks_missing, report.evicted_left) == (0, 0)
        assert engine.scheduler.stats.compactions["snapkv/decode"] > 1


def test_speculation_on_top_gives_the_same_tokens(probe_model, run, requests) -> None:
    """vLLM's own n-gram drafts; no draft straddles a compaction."""
    expected, _ = run
    with opened(probe_model, SETTING, speculative_config=NGRAM) as engine:
        add_all(engine, requests)
        steps = engine.drain()
        assert tokens_of(engine) == expected
        assert steps < NUM_TOKENS, "drafts were accepted"
        assert_idle(engine)
        report = churn(engine, 15, seed=9)
        assert (report.blocks_missing, report.evicted_left) == (0, 0)


class Record:
    """Every query of every request, as a recorder of the attention layers sees it."""

    is_active = True

    def __init__(self, engine: Engine) -> None:
        self.state = engine.runner.model_state
        self.queries: dict[tuple[int, str, int], torch.Tensor] = {}
        self.num_taken = 0
        self.state.taps.recorders.append(self)
        ring = self.state.ring
        take = ring.take

        def checked(row: int, layer: str, position: int, window: int) -> torch.Tensor:
            found = take(row, layer, position, window)
            own = [self.queries[row, layer, at] for at in range(position - window, position)]
            assert torch.equal(found, torch.stack(own, dim=1)), (row, layer, position)
            self.num_taken += 1
            return found

        ring.take = checked

    def record(self, layer_name: str, query: torch.Tensor) -> None:
        batch = self.state.lengths._batch
        for row, request in enumerate(batch.idx_mapping_np):
            for token in range(*batch.query_start_loc_np[row : row + 2]):
                place = int(request), layer_name, int(batch.positions[token])
                self.queries[place] = query[token].clone()


@pytest.mark.parametrize(
    "arguments",
    [{"async_scheduling": True}, {"speculative_config": NGRAM}],
    ids=["async", "drafts"],
)
def test_one_slot_for_all_requests(
    probe_model, run, requests, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests wait for their turn, are counted, and say what they say alone."""
    expected, _ = run
    monkeypatch.setattr(decode_queries, "MIN_SLOTS", 1)
    monkeypatch.setattr(decode_queries, "RING_BYTES", 0)
    with opened(probe_model, SETTING, **arguments) as engine:
        assert engine.runner.model_state.ring.shape.num_slots == 1
        record = Record(engine)
        prompt, xargs = requests[0]
        alone = engine.generate([prompt], NUM_TOKENS, xargs, ignore_eos=True)
        assert alone == expected[:1], "nobody else wants the slot"
        stats = engine.scheduler.stats
        assert stats.deferrals == 0
        own = [engine.generate([each[0]], NUM_TOKENS, ignore_eos=True)[0] for each in requests[:2]]
        before = record.num_taken
        for number in range(2):
            engine.add(str(number), *requests[number][:1], NUM_TOKENS, ignore_eos=True)
        engine.add("4", requests[2][0], NUM_TOKENS, requests[2][1], ignore_eos=True)
        while engine.engine.has_unfinished_requests():
            engine.step()
            engine.scheduler.check_integrity()
        assert engine.results["4"].token_ids == expected[2]
        assert [engine.results[str(i)].token_ids for i in range(2)] == own
        assert stats.deferrals > 0
        assert record.num_taken > before
        assert_idle(engine)

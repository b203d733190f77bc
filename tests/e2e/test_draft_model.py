"""vLLM's own draft models over a cache that evicts: the tokens of the evicting engine alone.

Each engine lives inside one fixture or test, which closes it before the next one opens.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest

from lab.random_models import distinct_tokens, write_random_model
from tests.e2e.conftest import assert_idle, opened
from tests.inside import managers, preempt
from vllm_kvcompress.evaluation.engine import Engine

pytestmark = pytest.mark.engine

BLOCK, INTERVAL, NUM_TOKENS, NUM_DRAFTS = 32, 16, 52, 3
SETTING = {
    "preset": "snapkv",
    "observation_window": 8,
    "budget": {"tokens": 96, "floor": 1},
    "layer_groups": {"count": 2},
    "trigger": "both",
    "interval": INTERVAL,
    "min_prompt_len": 0,
}
OPTED_OUT = {"kv_compression": "none"}

Requests = list[tuple[list[int], dict[str, Any] | None]]
Compactions = set[tuple[str, int, int]]
"""Last digit of a request's name, the plan's sequence length, the worker's after the step."""


def drafting(model: str) -> dict[str, Any]:
    """vLLM's configuration of a draft model."""
    return {"method": "draft_model", "model": model, "num_speculative_tokens": NUM_DRAFTS}


def add_all(engine: Engine, requests: Requests) -> list[str]:
    names = [f"{len(engine.results)}-{number}" for number in range(len(requests))]
    for name, (prompt, xargs) in zip(names, requests, strict=True):
        engine.add(name, prompt, NUM_TOKENS, xargs, ignore_eos=True)
    return names


def watch_compactions(engine: Engine) -> Compactions:
    """Collect what the worker compacts, with the length that it knows itself from the device."""
    compact, found = engine.runner._compact, set()

    def watched(plans: Any) -> Any:
        batch = engine.runner.model_state.lengths._batch
        lengths = dict(zip(batch.req_ids, batch.seq_lens.tolist(), strict=False))
        for plan in plans:
            name = plan.request_id.rsplit("-", 1)[0]
            found.add((name[-1], plan.position, lengths[plan.request_id]))
        return compact(plans)

    engine.runner._compact = watched
    return found


def run_all(engine: Engine, requests: Requests) -> tuple[list[list[int]], Compactions]:
    """Run all at once, with a look at the books after every step."""
    names, compactions = add_all(engine, requests), watch_compactions(engine)
    while engine.engine.has_unfinished_requests():
        engine.step()
        engine.scheduler.check_integrity()
    return [engine.results[name].token_ids for name in names], compactions


@pytest.fixture(scope="module")
def requests(prompts) -> Requests:
    """A long prompt, one that is compacted only later, one that is left alone."""
    return [(prompts[0][:500], None), (prompts[1][:110], None), (prompts[2][:300], OPTED_OUT)]


@pytest.fixture(scope="module")
def plain(probe_model: str, requests: Requests) -> tuple[list[list[int]], Compactions]:
    """What the evicting engine does without drafts."""
    with opened(probe_model, SETTING) as engine:
        tokens, compactions = run_all(engine, requests)
        assert_idle(engine)
    assert compactions == {
        (name, at, at) for name, at in (("0", 500), ("0", 516), ("0", 548), ("1", 142))
    }
    return tokens, compactions


@pytest.fixture(scope="module")
def expected(plain) -> list[list[int]]:
    return plain[0]


@dataclass
class Seen:
    """What happened in the engine whose model drafts for itself.

    Attributes
    ----------
    tokens, after_hit, after_preemption : list[list[int]]
        Of the three requests; of the first with a hit in the prefix cache; of the three again.
    steps : dict[str, int]
        Engine steps in which a request yielded tokens.
    num_cached : int or None
        Tokens of the hit.
    room : dict[tuple[str, int or None], list[int]]
        Tokens that a request's blocks had room for beyond its length, after every step, in every
        layer group (None: the draft model).
    compactions : set[tuple[str, int, int]]
        On the way to `tokens`.
    """

    tokens: list[list[int]] = field(default_factory=list)
    after_hit: list[list[int]] = field(default_factory=list)
    after_preemption: list[list[int]] = field(default_factory=list)
    num_cached: int | None = None
    steps: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    room: dict[tuple[str, int | None], list[int]] = field(default_factory=lambda: defaultdict(list))
    compactions: Compactions = field(default_factory=set)


@pytest.fixture(scope="module")
def seen(probe_model: str, requests: Requests, expected) -> Seen:
    """The probe model drafts for itself, over a whole cache of its own. Prompts come in chunks."""
    found = Seen()
    options: Any = {"speculative_config": drafting(probe_model), "max_num_batched_tokens": 256}
    with opened(probe_model, SETTING, **options) as engine:
        names, compactions = add_all(engine, requests), watch_compactions(engine)
        while engine.engine.has_unfinished_requests():
            before = {name: len(engine.results[name].token_ids) for name in names}
            engine.step()
            engine.scheduler.check_integrity()
            for name in names:
                found.steps[name] += len(engine.results[name].token_ids) > before[name]
            look_at_blocks(engine, found)
        found.tokens = [engine.results[name].token_ids for name in names]
        found.compactions = set(compactions)
        assert_idle(engine)

        again = add_all(engine, requests[:1])
        engine.drain()
        found.after_hit = [engine.results[again[0]].token_ids]
        found.num_cached = engine.results[again[0]].num_cached_tokens
        assert engine.scheduler.reset_prefix_cache()

        found.after_preemption = preempt_and_abort(engine, requests)
        assert_idle(engine)
    return found


def look_at_blocks(engine: Engine, found: Seen) -> None:
    for name, request in engine.live().items():
        for manager in managers(engine):
            size = len(manager.req_to_blocks[request.request_id]) * manager.block_size
            group = manager.kv_cache_spec.layer_group
            found.room[name, group].append(size - request.num_computed_tokens)
            assert group is not None or not manager.evicted


def preempt_and_abort(engine: Engine, requests: Requests) -> list[list[int]]:
    """The first is preempted after two compactions; strangers end at every stage beside them."""
    prompt = requests[0][0][200::-1]
    names = add_all(engine, requests)
    for stage in ("prefill", "plan", "decode"):
        engine.add(f"stranger-{stage}", prompt, NUM_TOKENS, ignore_eos=True)
    preempted, aborted = False, set()
    while engine.engine.has_unfinished_requests():
        engine.step()
        engine.scheduler.check_integrity()
        live = engine.live()
        for name, request in live.items():
            stage = name.removeprefix("stranger-")
            if (
                (stage == "prefill" and 0 < request.num_computed_tokens < len(prompt))
                or (stage == "plan" and engine.scheduler.compactions.is_planned(request.request_id))
                or (stage == "decode" and request.num_output_tokens > INTERVAL)
            ):
                engine.abort(name)
                aborted.add(stage)
        first = live.get(names[0])
        if first is not None and first.num_output_tokens > INTERVAL and not preempted:
            preempted = True
            preempt(engine, first)
    assert preempted and aborted == {"prefill", "plan", "decode"}
    return [engine.results[name].token_ids for name in names]


def test_drafts_give_the_same_tokens(seen: Seen, plain) -> None:
    assert (seen.tokens, seen.compactions) == plain


def test_the_draft_models_cache_is_right_beside_compactions(seen: Seen) -> None:
    """Over a whole cache the draft model is the target: all its drafts are accepted."""
    steps = list(seen.steps.values())
    assert steps[2] == 1 + -(-(NUM_TOKENS - 1) // (NUM_DRAFTS + 1))
    assert steps[0] < NUM_TOKENS, "drafts are accepted over the compacted cache too"


def test_the_draft_models_cache_is_kept_whole(seen: Seen) -> None:
    (first, *_) = [name for name, _ in seen.room]
    assert min(seen.room[first, None]) >= 0, "every token has a slot"
    for group in (0, 1):
        assert min(seen.room[first, group]) < -200, "the target's cache was compacted"
    assert min(min(room) for (name, _), room in seen.room.items() if name.endswith("-2")) >= 0


def test_a_prefix_cache_hit_gives_the_same_tokens(seen: Seen, expected) -> None:
    assert seen.after_hit == expected[:1]
    # All but the observation window, in whole blocks of both models.
    assert seen.num_cached == (500 - 8) // BLOCK * BLOCK


def test_preempted_and_aborted_neighbours_give_the_same_tokens(seen: Seen, expected) -> None:
    assert seen.after_preemption == expected


def test_random_models_and_async_scheduling(tmp_path) -> None:
    """A draft model with half the target's KV heads, and the target itself over all that was cut.

    The first has blocks of twice the tokens, and hardly a draft is accepted; of the second some.
    Asynchronous scheduling counts drafts as computed whose verdict is still to come: no compaction
    may hinge on them.
    """
    setting = {**SETTING, "budget": {"tokens": 440, "floor": 1}}
    target, other = (str(write_random_model(tmp_path / name, name)) for name in ("qwen3", "llama"))
    long, short, whole = (distinct_tokens(500, 1), distinct_tokens(110, 2), distinct_tokens(300, 3))
    requests: Requests = [(long, None), (short, None), (whole, OPTED_OUT)]
    options: Any = {"skip_tokenizer_init": True, "max_model_len": 2048}
    with opened(target, setting, **options) as engine:
        expected = run_all(engine, requests)
        assert expected[1] == {("0", at, at) for at in (500, 516, 548)}
    with opened(target, setting, speculative_config=drafting(other), **options) as engine:
        sizes = {m.kv_cache_spec.layer_group: m.block_size for m in managers(engine)}
        assert sizes == {0: BLOCK, 1: BLOCK, None: 2 * BLOCK}
        assert run_all(engine, requests) == expected
        assert_idle(engine)
    options |= {"speculative_config": drafting(target), "async_scheduling": True}
    with opened(target, setting, **options) as engine:
        assert engine.core.batch_queue is not None
        assert run_all(engine, requests) == expected
        assert_idle(engine)

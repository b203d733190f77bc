"""One request must not harm the server: whatever it brings, the next one is served."""

from collections.abc import Iterator

import pytest
from vllm.exceptions import VLLMValidationError

from tests.e2e.conftest import assert_idle, opened
from tests.inside import has_declined
from vllm_kvcompress.evaluation.engine import Engine, Result
from vllm_kvcompress.metrics import MAX_SAMPLES

pytestmark = pytest.mark.engine

PROMPT = [5 + (i * 7919) % 900 for i in range(1025)]
NONE = {"kv_compression": "none"}


@pytest.fixture(scope="module")
def engine(probe_model: str) -> Iterator[Engine]:
    """Evicts; vLLM's statistics are off, as they are in `LLM` by default."""
    setting = {"preset": "snapkv", "budget": {"ratio": 0.25}}
    with opened(probe_model, setting, max_model_len=4096) as engine:
        yield engine


def uncompressed(engine: Engine, reason: str) -> int:
    return engine.scheduler.stats.uncompressed.get(reason, 0)


# --- sessions -----------------------------------------------------------------------------


def run_session(engine: Engine, name: str, xargs: dict, chunks: list[list[int]]) -> list[int]:
    """A streaming session: chunks of one prompt, a few tokens after each."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0, max_tokens=4, ignore_eos=True, extra_args=xargs,
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    core, processor = engine.engine.engine_core, engine.engine.input_processor
    tokens: list[int] = []
    for number, chunk in enumerate(chunks):
        request = processor.process_inputs(
            name, {"prompt_token_ids": chunk}, params, ("generate",),
            resumable=number < len(chunks) - 1,
        )  # fmt: skip
        core.add_request(request)
        for _ in range(9):
            for outputs in core.engine_core.step()[0].values():
                for output in outputs.outputs:
                    tokens += output.new_token_ids
    return tokens


@pytest.mark.parametrize("preset", ["h2o", "snapkv", "streaming_llm"])
@pytest.mark.parametrize("is_cached", [False, True])
def test_a_session_is_served_uncompressed(engine, preset: str, is_cached: bool) -> None:
    """Policies that read the whole prompt once waited for queries that never came."""
    prompt = [5 + (i * 31 + len(preset)) % 900 for i in range(1800)]
    if is_cached:
        engine.generate([prompt[:620]], 2, NONE, ignore_eos=True)
    before = uncompressed(engine, "streaming_input")
    chunks = [prompt[:600], prompt[600:1200], prompt[1200:]]
    tokens = run_session(engine, f"s-{preset}-{is_cached}", {"kv_compression": preset}, chunks)
    assert len(tokens) >= 8
    assert uncompressed(engine, "streaming_input") == before + 1
    while engine.core.scheduler.has_requests():
        engine.core.step()
    assert_idle(engine)
    assert len(engine.generate([PROMPT], 4, ignore_eos=True)[0]) == 4


def test_a_session_with_pins_is_refused(engine) -> None:
    with pytest.raises(
        VLLMValidationError, match="kv_pin: a streaming session is never compressed"
    ):
        run_session(engine, "pins", {"kv_pin": [0, 10]}, [PROMPT[:100], PROMPT[100:200]])


# --- options that nobody has checked ------------------------------------------------------

BAD = [
    {"kv_budget_ratio": 7},
    {"kv_compression": "zip"},
    {"kv_compression": ["snapkv"]},
    {"kv_pin": [0, 5000]},
    {"kv_budget_tokens": 10**30},
    {"kv_task": "auto"},
    {"kv_draft_tokens": 3},
    {"kv_compression": "rkv"},  # reads queries while decoding; this server keeps none
    {"kv_nonsense": 1, "kv_budget_ration": 2},
]


@pytest.mark.parametrize("extra", BAD, ids=str)
def test_unchecked_options_do_not_end_the_engine(engine, extra: dict) -> None:
    """Requests that reach the scheduler past `process_inputs`."""
    from vllm import SamplingParams

    expected = engine.generate([PROMPT], 6, NONE, ignore_eos=True)[0]
    before = uncompressed(engine, "invalid_options")
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    request = engine.engine.input_processor.process_inputs(
        "bad", {"prompt_token_ids": PROMPT}, params, ("generate",)
    )
    request.sampling_params.extra_args = extra
    engine.results["bad"] = Result()
    engine.engine.add_request("bad", request, params)
    engine.drain()
    assert uncompressed(engine, "invalid_options") == before + 1
    assert engine.results["bad"].token_ids == expected, "served uncompressed"
    assert_idle(engine)


def test_keys_that_are_no_text_are_refused(engine) -> None:
    """In a process of its own the engine could not read such a request, nor any later one."""
    with pytest.raises(VLLMValidationError, match="extra_args: a key must be a text, got 1"):
        engine.generate([PROMPT], 3, {1: 2, "other": None}, ignore_eos=True)
    engine.results.clear()
    assert len(engine.generate([PROMPT], 3, {"other": None}, ignore_eos=True)[0]) == 3


def test_a_prompt_that_cannot_be_read_is_no_task(engine) -> None:
    """The classifier runs in the engine's loop; ids that its tokenizer rejects decide nothing."""
    classify = engine.scheduler.admission.classifier.classify

    class Unreadable:
        prompt_token_ids = [-(2**70), 3]
        mm_features: list = []

    assert classify(Unreadable()) is None


# --- requests too short to gain -----------------------------------------------------------


def test_a_request_of_one_token_pays_nothing(engine) -> None:
    """Beam search sends one such request a step."""
    before = uncompressed(engine, "short_output"), dict(engine.scheduler.stats.compactions)
    engine.generate([PROMPT], 1, ignore_eos=True)
    stats = engine.scheduler.stats
    assert (uncompressed(engine, "short_output") - 1, dict(stats.compactions)) == before
    assert engine.scheduler.stats.deferrals == 0


def test_statistics_that_nobody_takes_stay_small(engine) -> None:
    assert engine.scheduler.log_stats is False
    stats = engine.scheduler.stats
    before = sum(stats.compactions.values())
    for index in range(3):
        engine.generate([[9 + index, *PROMPT]], 4, ignore_eos=True)
    assert sum(stats.compactions.values()) == before + 3
    assert stats.kept_ratios.maxlen == stats.seconds.maxlen == MAX_SAMPLES
    assert not has_declined(engine.scheduler.compactions.room)


# --- shared prompts -----------------------------------------------------------------------


def held_per_step(engine: Engine, count: int, xargs: dict | None) -> list[int]:
    """Blocks held in each step of `count` samples of one prompt of 1,000 tokens."""
    from vllm import SamplingParams

    assert engine.scheduler.reset_prefix_cache()
    name = f"{count}-{xargs}"
    params = SamplingParams(
        n=count, temperature=1.0, seed=1, max_tokens=20, ignore_eos=True, extra_args=xargs
    )
    engine.results[name] = Result()
    engine.engine.add_request(name, {"prompt_token_ids": PROMPT[:1000]}, params)
    held = []
    while engine.engine.has_unfinished_requests():
        engine.engine.step()
        held.append(engine.num_usable_blocks - engine.pool.get_num_free_blocks())
    return held


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_samples_of_one_prompt_give_back_what_they_take(engine, count) -> None:
    """Once 8 samples held 72 blocks, 115 at the peak, where 39 do, and a gain was reported."""
    stats = engine.scheduler.stats
    before = {n: dict(getattr(stats, n)) for n in ("blocks_taken", "blocks_returned")}
    with_it, without = held_per_step(engine, count, None), held_per_step(engine, count, NONE)
    gain = {n: getattr(stats, n).get("snapkv", 0) - before[n].get("snapkv", 0) for n in before}
    assert gain["blocks_returned"] >= gain["blocks_taken"]
    # Each sample computes its observation window of 64 tokens itself, in two blocks of its own.
    assert all(a <= b + 2 * count for a, b in zip(with_it[5:-1], without[5:-1], strict=False))
    assert max(with_it) <= max(without) + 2 * count + gain["blocks_taken"]
    if count == 1:
        assert gain["blocks_returned"] > 2 * gain["blocks_taken"] > 0
    assert_idle(engine)

"""Draft steps from graphs give the drafts of eager ones, in batches of changing sizes.

On a CPU, with tapes in the place of CUDA graphs (see cpu_graphs.py); test_gpu.py has the real ones.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.conftest import FOUR_GROUPS, assert_idle, opened
from tests.e2e.cpu_graphs import TapeManager, taped_graphs
from vllm_kvcompress.evaluation.engine import Engine, Result

pytestmark = pytest.mark.engine

SIZES = [1, 2, 4]
LENGTHS = (210, 260, 300, 340, 390)
NUM_TOKENS = (12, 26, 30, 20, 10)
ARRIVALS = (0, 1, 2, 3, 3)
"""Steps at which requests come: batches of one to five rows draft, five being more than a graph."""

SETTINGS = {
    # Confidences and a ring of queries, which recorders must leave alone in draft steps.
    "greedy": {
        "preset": "snapkv",
        "draft": {"tokens": 4, "min_confidence": 0.3, "refresh_every": 8},
    },
    # Tables, lengths and slots that differ between four groups; temperatures and seeds.
    "probabilistic": {
        **FOUR_GROUPS,
        "draft": {"tokens": 3, "sample": "probabilistic"},
    },
}
COMMON = {"mode": "draft", "budget": {"ratio": 0.25}, "min_prompt_len": 128}


@pytest.fixture(scope="module", params=SETTINGS)
def engine(request: pytest.FixtureRequest, probe_model: str) -> Iterator[Engine]:
    setting = {**SETTINGS[request.param], **COMMON}
    with opened(probe_model, setting, max_num_seqs=5, enable_prefix_caching=False) as engine:
        yield engine


def serve(engine: Engine, prompts: list[list[int]], name: str) -> dict[str, Any]:
    """Run the five requests; return their tokens, all drafts, and how they progressed."""
    from vllm import SamplingParams

    speculator = engine.runner.speculator
    propose: Callable = type(speculator).propose.__get__(speculator)
    drafts: list[dict[int, list[int]]] = []
    sizes: list[int] = []

    def spy(batch: Any, *args: Any, **kwargs: Any) -> Any:
        found = propose(batch, *args, **kwargs)
        rows = {each: row for row, each in enumerate(batch.req_ids)}
        made = {
            int(each.split("-")[1]): found[rows[each], :count].tolist()
            for each, count in speculator.counts.items()
        }
        drafts.append(made)
        sizes.extend([len(made)] * speculator.num_steps)
        return found

    speculator.propose = spy
    progress: list[list[int]] = []
    try:
        waiting = list(range(len(LENGTHS)))
        while waiting or engine.engine.has_unfinished_requests():
            for index in [each for each in waiting if ARRIVALS[each] <= len(progress)]:
                waiting.remove(index)
                request_id = f"{name}-{index}"
                engine.results[request_id] = Result()
                params = SamplingParams(
                    temperature=0.7 if index % 2 else 0.0,
                    seed=index,
                    max_tokens=NUM_TOKENS[index],
                    ignore_eos=True,
                )
                tokens = prompts[index][: LENGTHS[index]]
                engine.engine.add_request(request_id, {"prompt_token_ids": tokens}, params)
            engine.step()
            results = [engine.results.get(f"{name}-{index}") for index in range(len(LENGTHS))]
            progress.append([len(each.token_ids) if each else 0 for each in results])
    finally:
        del speculator.propose
    tokens = [engine.results[f"{name}-{index}"].token_ids for index in range(len(LENGTHS))]
    return {"tokens": tokens, "drafts": drafts, "progress": progress, "sizes": sizes}


def assert_padded(step: Any, desc: Any) -> None:
    """Rows behind those that draft own no request: no query, no slot, no length, no block."""
    count, num_padded = len(step._rows.requests), desc.num_tokens
    assert step.query_start_loc[: num_padded + 1].tolist() == [
        min(row, count) for row in range(num_padded + 1)
    ]
    padding = slice(count, num_padded)
    assert (step.requests[padding] == -1).all() and (step.requests[:count] >= 0).all()
    assert (step.slots[:, padding] == -1).all() and (step.slots[:, :count] >= 0).all()
    assert (step.seq_lens[:, padding] == 0).all() and (step.seq_lens[:, :count] > 0).all()
    for table in step.view_tables:
        assert (table[padding] == 0).all() and (table[:count, 0] > 0).all()


def addresses(step: Any) -> dict[str, list[int]]:
    """Where the buffers lie."""
    buffers = ("input_ids", "positions", "requests", "query_start_loc", "slots", "seq_lens")
    buffers += ("view_tables", "number", "confidence", "temperature", "seeds")
    found = {name: getattr(step, name) for name in buffers}
    return {
        name: [each.data_ptr() for each in (value if isinstance(value, list) else [value])]
        for name, value in found.items()
    }


def test_graphs_draft_what_eager_steps_draft(engine: Engine, prompts) -> None:
    eager = serve(engine, prompts, "eager")
    assert set(eager["sizes"]) == {1, 2, 3, 4, 5}, "other arrivals are needed"
    assert {(4, 3), (5, 3)} & set(zip(eager["sizes"], eager["sizes"][1:], strict=False)), (
        "no batch shrinks to one that is padded: padding would find clean buffers"
    )
    steps = zip(eager["progress"], eager["progress"][1:], strict=False)
    assert any(b - a > 2 for one, other in steps for a, b in zip(one, other, strict=True)), (
        "no drafts were accepted"
    )
    with taped_graphs(engine.runner, SIZES) as manager:
        assert isinstance(manager, TapeManager)
        assert sorted(desc.num_tokens for desc in manager.graphs) == SIZES
        step, replay = engine.runner.speculator.step, manager.run_fullgraph
        manager.run_fullgraph = lambda desc: (assert_padded(step, desc), replay(desc))
        before = addresses(step)
        graphs = serve(engine, prompts, "graphs")
        assert addresses(step) == before
        padded = [min((s for s in SIZES if s >= n), default=0) for n in graphs["sizes"]]
        assert manager.replays == [size for size in padded if size]
        assert padded.count(0) > 0, "a batch that is larger than all graphs runs eagerly"
    assert graphs == eager
    assert_idle(engine)


def test_recorders_see_no_draft_step(engine: Engine, prompts, monkeypatch) -> None:
    """Neither an eager one, nor one that is captured: a ring would be part of the graph."""
    speculator, seen = engine.runner.speculator, []
    is_drafting = []
    for recorder in engine.runner.model_state.taps.recorders:
        record = recorder.record
        monkeypatch.setattr(
            recorder,
            "record",
            lambda *args, record=record: (seen.append(bool(is_drafting)), record(*args)),
        )
    run = speculator.step.run

    def noted(*args: Any) -> None:
        is_drafting.append(True)
        run(*args)
        is_drafting.pop()

    monkeypatch.setattr(speculator.step, "run", noted)
    with taped_graphs(engine.runner, SIZES[:1]):
        serve(engine, prompts, "recorded")
    assert seen and not any(seen)


def test_modes_without_full_decode_graphs_capture_nothing(engine: Engine, monkeypatch) -> None:
    """What vLLM has left of -cc.cudagraph_mode decides; LoRA needs eager steps."""
    from unittest.mock import patch

    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms import current_platform

    runner, speculator = engine.runner, engine.runner.speculator
    monkeypatch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
    monkeypatch.setattr(runner.compilation_config, "cudagraph_capture_sizes", SIZES)
    monkeypatch.setattr(runner.compilation_config, "max_cudagraph_capture_size", SIZES[-1])
    found = {}
    try:
        for mode in CUDAGraphMode:
            speculator.init_cudagraph_manager(mode)
            found[mode.name] = speculator.cudagraph_manager.needs_capture()
        with patch.object(engine.runner.vllm_config, "lora_config", object()):
            speculator.init_cudagraph_manager(CUDAGraphMode.FULL)
            found["LORA"] = speculator.cudagraph_manager.needs_capture()
    finally:
        speculator.init_cudagraph_manager(CUDAGraphMode.NONE)
    full = {"FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"}
    assert {name for name, captures in found.items() if captures} == full
    speculator.capture()  # captures nothing, and needs no GPU for that
    assert speculator._dispatch(1).cg_mode == CUDAGraphMode.NONE

"""A real engine on the GPU's path decides and says what it does on the CPU's.

Strided caches, our Triton kernels through the interpreter, vLLM's Triton metadata. What this cannot
show: streams, CUDA graphs, and what the compiler makes of the kernels (docs/gpu.md).
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu_path.runs import Run, assert_equal, run_all, table
from tests.gpu_path.scenarios import (
    DECODING,
    DRAFT,
    EVICT,
    TURNED_ALONE,
    VIEWS,
    Said,
    finish,
    policy_names,
)
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.tasks.needle import make_samples
from vllm_kvcompress.plans import PlanKind, Purpose

pytestmark = pytest.mark.engine

EVERY_STEP = {"_seq_lens_kernel", "_ring_kernel"}

Pair = tuple[dict[str, Run], dict[str, Run]]


@pytest.fixture(scope="module")
def prompts(probe_model: str) -> list[list[int]]:
    """Five prompts of about 250 tokens that ask for a number."""
    from transformers import AutoTokenizer

    encode: Callable[[str], list[int]] = AutoTokenizer.from_pretrained(probe_model).encode
    return [encode(sample.prompt) for sample in make_samples(5, 250, encode, seed=11)]


def both(model: str, setting: Any, prompts, scenarios, backend: str, **engine_args: Any) -> Pair:
    cpu = run_all(model, setting, prompts, scenarios, None, **engine_args)
    gpu = run_all(model, setting, prompts, scenarios, backend, **engine_args)
    sys.stderr.write("\n".join(["", *table(cpu, gpu), ""]))
    return cpu, gpu


@pytest.fixture(scope="module")
def evict(probe_model: str, prompts) -> Pair:
    return both(probe_model, DECODING, prompts, EVICT, "strided", num_blocks=72)


@pytest.fixture(scope="module")
def draft(probe_model: str, prompts, evict) -> Pair:
    """After `evict`: one engine at a time."""
    return both(probe_model, VIEWS, prompts, DRAFT, "small_blocks")


def check(runs: Pair, name: str) -> None:
    cpu, gpu = (each[name] for each in runs)
    assert gpu.survivors, "nothing was compacted: the scenario shows nothing"
    assert not cpu.launches and cpu.torch_runs
    assert gpu.launches and not gpu.torch_runs, "a torch version ran on the GPU's path"
    assert_equal(cpu, gpu)


@pytest.mark.parametrize("name", EVICT)
def test_eviction_is_that_of_the_cpus_path(evict: Pair, name: str) -> None:
    check(evict, name)


@pytest.mark.parametrize("name", DRAFT)
def test_drafts_are_those_of_the_cpus_path(draft: Pair, name: str) -> None:
    check(draft, name)


def test_the_scenarios_show_what_they_are_for(evict: Pair, draft: Pair, prompts) -> None:
    _, runs = evict
    assert {name for name, *_ in runs["policies"].plans} == {*policy_names(), TURNED_ALONE}
    assert sum(position > 224 for _, position, *_ in runs["decoding"].plans) >= 2
    marks = [position for name, position, *_ in runs["inside prompts"].plans if name == "inside"]
    end = len(prompts[0])
    assert marks[:3] == [end - 112, end - 56, end] and len(marks) > 3, "the rest is in the budget"
    kinds = {
        name: {group.kind for *_, groups in run.plans for group in groups if group}
        for name, run in runs.items()
    }
    assert kinds["codebooks"] == set(PlanKind) - {PlanKind.TOKENS_IN_PLACE}
    assert PlanKind.TOKENS_IN_PLACE in kinds["small pool"]
    assert runs["prefix hits"].said.cached["again"] == 224
    assert runs["preemption"].said.counts["preemptions"] == 1
    assert runs["small pool"].said.counts["preemptions"] > 0
    _, runs = draft
    for run in runs.values():
        longest = max(map(len, run.said.tokens.values()))
        assert run.said.counts["steps"] < longest / 1.5, "drafts were accepted"
    assert {each[2] for each in runs["linked views"].plans} == {Purpose.LINKED_VIEW}
    both = {Purpose.EVICT, Purpose.COPIED_VIEW}
    assert {each[2] for each in runs["views of an evicted cache"].plans} == both


def test_requests_launch_nothing_that_the_warm_up_has_not(evict: Pair) -> None:
    """By name. `EVERY_STEP` come with any step: vLLM's own warm-up on a GPU runs real ones."""
    _, runs = evict
    assert runs["decoding"].launches.keys() - EVERY_STEP <= runs["warm-up"].launches.keys()


def test_every_kernel_of_ours_ran(root: Path, evict: Pair, draft: Pair) -> None:
    jitted = set()
    for path in (root / "kernels").rglob("*.py"):
        jitted |= set(re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE))
    launched = {
        name for _, runs in (evict, draft) for run in runs.values() for name in run.launches
    }
    assert launched == jitted


def test_asynchronous_steps_and_another_physical_layout(
    probe_model: str, prompts, evict: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads before slots, and all layers of a block together, where the other runs have neither."""
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "BLHNC")
    strides = []

    def decoding(engine: Engine, prompts: Any) -> Said:
        strides.append(engine.runner.compactor.layers[0].cache().stride())
        assert engine.core.batch_queue is not None, "not asynchronous"
        return EVICT["decoding"](engine, prompts)

    scenarios = {"decoding": decoding}
    found = run_all(
        probe_model, DECODING, prompts, scenarios, "strided", num_blocks=72, async_scheduling=True
    )
    (block, head, slot, _), size = strides[0], 128
    assert slot == size and head == 32 * size and block > 2 * head
    assert found["decoding"].said.tokens == evict[0]["decoding"].said.tokens
    assert found["decoding"].launches and not found["decoding"].torch_runs


def test_vllms_own_triton_attention_reads_what_we_compacted(
    probe_model: str, prompts, evict: Pair
) -> None:
    """A very short prompt: the interpreter needs half a second per layer and token."""
    setting = {**DECODING, "budget": {"tokens": 32, "floor": 1}, "trigger": "end_of_prompt"}

    def short(engine: Engine, prompts: Any) -> Said:
        engine.add("short", prompts[0][-100:], 4, ignore_eos=True)
        return finish(engine, ["short"])

    setting = {key: value for key, value in setting.items() if key != "interval"}
    cpu, gpu = both(probe_model, setting, prompts, {"short": short}, "triton")
    check((cpu, gpu), "short")

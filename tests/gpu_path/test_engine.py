"""A real engine on the GPU's path decides and says what it does on the CPU's.

Strided caches, our Triton kernels through the interpreter, vLLM's Triton metadata. What this cannot
show: streams, CUDA graphs, and what the compiler makes of the kernels (docs/gpu.md).
"""

import sys
from collections import Counter
from collections.abc import Callable

import pytest

from tests.e2e.conftest import serving
from tests.gpu_path.runs import Run, assert_equal, run_all, table
from tests.gpu_path.scenarios import DECODING, DRAFT, EVICT, VIEWS
from vllm_kvcompress.evaluation.tasks.needle import make_samples

pytestmark = pytest.mark.engine

Pair = tuple[dict[str, Run], dict[str, Run]]


@pytest.fixture(scope="session")
def prompts(probe_model: str) -> list[list[int]]:
    """Five prompts of about 250 tokens that ask for a number."""
    from transformers import AutoTokenizer

    encode: Callable[[str], list[int]] = AutoTokenizer.from_pretrained(probe_model).encode
    return [encode(sample.prompt) for sample in make_samples(5, 250, encode, seed=11)]


def both(probe_model: str, setting, prompts, scenarios, backend: str, **engine_args) -> Pair:
    cpu = run_all(probe_model, setting, prompts, scenarios, None, **engine_args)
    gpu = run_all(probe_model, setting, prompts, scenarios, backend, **engine_args)
    sys.stderr.write("\n".join(["", *table(cpu, gpu), ""]))
    return cpu, gpu


@pytest.fixture(scope="module")
def evict(probe_model: str, prompts) -> Pair:
    return both(probe_model, DECODING, prompts, EVICT, "strided", num_blocks=72)


@pytest.fixture(scope="module")
def draft(probe_model: str, prompts) -> Pair:
    return both(probe_model, VIEWS, prompts, DRAFT, "small_blocks")


@pytest.mark.parametrize("name", EVICT)
def test_eviction(evict: Pair, name: str) -> None:
    check(evict, name)


@pytest.mark.parametrize("name", DRAFT)
def test_drafts(draft: Pair, name: str) -> None:
    check(draft, name)


def check(runs: Pair, name: str) -> None:
    cpu, gpu = (each[name] for each in runs)
    assert gpu.plans and gpu.survivors, "nothing was compacted: the scenario shows nothing"
    assert not cpu.launches and cpu.torch_runs
    assert gpu.launches and not gpu.torch_runs, "a torch version ran on the GPU's path"
    assert_equal(cpu, gpu)

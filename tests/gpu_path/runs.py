"""The same scenarios on the CPU's own path and on the GPU's, one engine after the other."""

import time
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lab.gpu_path.plugin import gpu_path
from tests.e2e.conftest import opened
from tests.gpu_path.scenarios import ENGINE, Prompts, Said, Scenario
from tests.gpu_path.watch import Watch, watch_plans, watching


@dataclass
class Run:
    """One scenario on one engine; what a `Watch` has, of it alone."""

    said: Said
    plans: list[Any]
    survivors: list[torch.Tensor]
    launches: Counter[str]
    torch_runs: Counter[str]
    seconds: float


def run_all(
    model: str,
    setting: Any,
    prompts: Prompts,
    scenarios: dict[str, Scenario],
    backend: str | None,
    **engine_args: Any,
) -> dict[str, Run]:
    """Open an engine, on the GPU path if a backend is given, and run scenarios in order."""
    path = gpu_path(backend) if backend is not None else nullcontext()
    options = {**ENGINE, **engine_args}
    with path, watching() as watch, opened(model, setting, **options) as engine:
        layout = type(engine.runner.compactor.layers[0].layout).__name__
        assert (layout == "StridedLayout") == (backend is not None), layout
        watch_plans(engine, watch)
        return {
            name: _timed(scenario, engine, prompts, watch) for name, scenario in scenarios.items()
        }


def _timed(scenario: Scenario, engine: Any, prompts: Prompts, watch: Watch) -> Run:
    num_plans, num_selections = len(watch.plans), len(watch.survivors)
    launches, torch_runs = watch.launches.copy(), watch.torch_runs.copy()
    start = time.perf_counter()
    said = scenario(engine, prompts)
    return Run(
        said,
        watch.plans[num_plans:],
        watch.survivors[num_selections:],
        watch.launches - launches,
        watch.torch_runs - torch_runs,
        time.perf_counter() - start,
    )


def assert_equal(cpu: Run, gpu: Run) -> None:
    """The same plans, block for block; the same survivors, in order; the same tokens and steps."""
    assert gpu.plans == cpu.plans
    assert len(gpu.survivors) == len(cpu.survivors)
    for number, (one, other) in enumerate(zip(cpu.survivors, gpu.survivors, strict=True)):
        assert torch.equal(one, other), f"selection {number} of {len(cpu.survivors)}"
    assert gpu.said == cpu.said


def table(cpu: dict[str, Run], gpu: dict[str, Run]) -> Iterable[str]:
    """One line per scenario: seconds, plans, launches."""
    yield f"{'scenario':28}{'CPU s':>8}{'GPU path s':>12}{'plans':>7}{'launches':>10}"
    for name, run in gpu.items():
        launches, plans = sum(run.launches.values()), len(run.plans)
        seconds = cpu[name].seconds
        yield f"{name:28}{seconds:8.1f}{run.seconds:12.1f}{plans:7}{launches:10}"

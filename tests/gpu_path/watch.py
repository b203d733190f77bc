"""What an engine decided and which version of each kernel did it."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch

from vllm_kvcompress.kernels import torch_backend, triton_backend
from vllm_kvcompress.kernels.dispatch import Backend
from vllm_kvcompress.messages import StepPlan

KERNELS = "vllm_kvcompress.kernels"
TWINS = [name for name in vars(Backend) if not name.startswith("_")]
"""What has a Triton and a torch version."""


@dataclass
class Watch:
    """Records while `watching`.

    Attributes
    ----------
    plans : list
        Every compaction plan, block numbers included, without the engine's request id.
    survivors : list[torch.Tensor]
        What every selection has chosen, [L, R, KV, K].
    launches : Counter
        Launches of our Triton kernels, by name.
    torch_runs : Counter
        Calls of torch versions, by name.
    """

    plans: list[Any] = field(default_factory=list)
    survivors: list[torch.Tensor] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)
    torch_runs: Counter[str] = field(default_factory=Counter)


@contextmanager
def watching() -> Iterator[Watch]:
    """Watch engines that are opened inside."""
    watch = Watch()
    with ExitStack() as stack:
        for name in TWINS:
            counted = _counted(getattr(torch_backend, name), watch.torch_runs)
            stack.enter_context(patch.object(torch_backend, name, counted))
        for backend in (triton_backend, torch_backend):
            kept = _kept(backend.select_tokens, watch.survivors)
            stack.enter_context(patch.object(backend, "select_tokens", kept))
        stack.enter_context(_counted_launches(watch.launches))
        yield watch


def watch_plans(engine: Any, watch: Watch) -> None:
    """Note the plans of one engine, as its worker gets them."""
    runner = engine.runner
    execute = runner.execute_model

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        for plan in StepPlan.of(scheduler_output).plans:
            name = plan.request_id.rsplit("-", 1)[0]
            watch.plans.append((name, plan.position, plan.purpose, plan.groups))
        return execute(scheduler_output, *args, **kwargs)

    runner.execute_model = execute_model


def _counted(function: Callable, runs: Counter[str]) -> Callable:
    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        runs[function.__name__] += 1
        return function(*args, **kwargs)

    return counted


def _kept(function: Callable, survivors: list[torch.Tensor]) -> Callable:
    @wraps(function)
    def kept(*args: Any, **kwargs: Any) -> torch.Tensor:
        found = function(*args, **kwargs)
        survivors.append(found.clone())
        return found

    return kept


@contextmanager
def _counted_launches(launches: Counter[str]) -> Iterator[None]:
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__.startswith(f"{KERNELS}."):
            launches[self.fn.__name__] += 1
        return run(self, *args, **kwargs)

    with patch.object(InterpretedFunction, "run", counted):
        yield

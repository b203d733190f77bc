"""Runs of the allocator's model, and what Hypothesis makes of a failure."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from hypothesis.stateful import run_state_machine_as_test

from tests.core.allocator.faults import FAULTS, spoilt
from tests.core.allocator.machine import Allocator
from tests.core.allocator.worlds import World, worlds


@contextmanager
def nothing_but_the_seed() -> Iterator[None]:
    """Let the seed alone decide what is drawn.

    Hypothesis tries constants that it finds in this package's modules, those of them that are
    loaded: which they are depends on the tests before, so on how a run's workers share them.
    """
    own = getattr(providers, "_get_local_constants", None)  # younger than what setup.py asks for
    if own is None:
        yield
        return
    nothing = type(own())()
    with patch.object(providers, "_get_local_constants", lambda: nothing):
        providers.CONSTANTS_CACHE.cache.clear()
        try:
            yield
        finally:
            providers.CONSTANTS_CACHE.cache.clear()


def run(
    number: int,
    num_runs: int,
    found: st.SearchStrategy[World] = worlds,
    phases: tuple[Phase, ...] = (Phase.generate, Phase.shrink),
    num_rules: int = 30,
) -> None:
    """Try so many sequences of events; the same number gives the same ones."""
    machine: Any = seed(number)(type("Allocator", (Allocator,), {"worlds": found}))
    rules = settings(
        max_examples=num_runs, stateful_step_count=num_rules, deadline=None, database=None,
        phases=phases, report_multiple_bugs=False, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    with nothing_but_the_seed():
        run_state_machine_as_test(machine, settings=rules)


def finds(name: str, num_runs: int = 200, **options: Any) -> Exception | None:
    """What the model says of a fault; None if it does not find it."""
    with spoilt(name):
        try:
            run(1, num_runs, FAULTS[name][1], **options)
        except Exception as error:
            return error
    return None


def shrunk(name: str) -> str:
    """One line: a fault, the rules that show it, what is said, and the seconds that took."""
    start = time.perf_counter()
    error = finds(name)
    if error is None:
        return f"{name}: NOT FOUND"
    notes = "\n".join(getattr(error, "__notes__", ()))
    rules = [line for line in notes.splitlines() if line.startswith("state.")]
    rules = [line for line in rules if not line.startswith(("state.open", "state.teardown"))]
    first = (str(error).splitlines() or [type(error).__name__])[0]
    seconds = time.perf_counter() - start
    return f"{name}: {len(rules)} rules ({'; '.join(rules)}): {first} [{seconds:.0f} s]"

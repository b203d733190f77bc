"""The allocator's model under any sequence of events: `machine` says which, `ledger` what holds."""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.core.allocator.machine import Allocator

STEPS = int(os.environ.get("KVCOMPRESS_ALLOCATOR_STEPS", "2000"))


def test_any_sequence() -> None:
    Allocator.counts.clear()
    number = 0
    while Allocator.counts["steps"] < STEPS:
        number += 1
        machine = seed(number)(type("Allocator", (Allocator,), {}))
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=50, stateful_step_count=30, deadline=None, database=None,
                derandomize=False, suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip
    print(Allocator.counts)

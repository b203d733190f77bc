"""The allocator's model under any sequence of events: `machine` says which, `ledger` what holds.

KVCOMPRESS_ALLOCATOR_STEPS=1000000 makes as many steps of the scheduler.
"""

import os
import sys

from tests.core.allocator.machine import Allocator
from tests.core.allocator.search import run

STEPS = int(os.environ.get("KVCOMPRESS_ALLOCATOR_STEPS", "100000"))
RUNS = 40
"""Sequences of events from one seed: a failure shrinks within them."""


def test_any_sequence_of_events() -> None:
    counts = Allocator.counts
    counts.clear()
    number = 0
    while counts["steps"] < STEPS:
        number += 1
        run(number, RUNS)
    sys.stdout.write(f"{number} seeds: {dict(counts)}\n")
    wanted = ("finished", "hits", "continued", "of prompts", "while decoding", "in place", "views")
    wanted += ("of equal prompts",)
    assert all(counts[each] > 0 for each in wanted), counts

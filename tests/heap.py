"""Garbage collections look at what tests made, not at what they imported.

An engine collects all garbage about a dozen times while it starts and stops. Where vLLM, torch and
transformers are imported that means walking through a million objects that never die, each time.
What lives once all tests are collected is set apart for good, and so is what a file of tests leaves
behind if it is much: modules that the first engine imports.

vLLM does the same to its own engine (``gc.freeze`` after a start), and undoes it for everything
when it stops (``gc.unfreeze``). Neither does anything in a test process: an engine's objects can be
collected at any time, and ours stay set apart.

Tests marked ``deep`` drive Python to its recursion limit. What another test left behind must not
be finalized there: its ``__del__`` would find no frame left, and pytest blames the test that runs.
"""

import atexit
import gc
from collections.abc import Iterator

import pytest

MANY = 100_000

_freeze, _unfreeze = gc.freeze, gc.unfreeze


def _set_apart() -> None:
    gc.collect()
    _freeze()


def pytest_collection_finish() -> None:
    """See above."""
    _set_apart()
    atexit.register(_unfreeze)  # else libraries complain of objects that nobody has freed


@pytest.fixture(autouse=True, scope="session")
def nobody_else_sets_apart() -> Iterator[None]:
    """See above."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@pytest.fixture(autouse=True, scope="module")
def modules_stay_apart() -> Iterator[None]:
    """See above. Set up first, so that a file's engine is closed by now."""
    yield
    if len(gc.get_objects(generation=2)) > MANY:
        _set_apart()


@pytest.fixture(autouse=True)
def nothing_dies_at_the_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """See above."""
    if request.node.get_closest_marker("deep") is None:
        yield
        return
    gc.disable()
    yield
    gc.enable()

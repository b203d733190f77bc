"""The allocator's model can fail: it finds each of the seeded faults, in a few sequences."""

import pytest
from hypothesis import Phase

from tests.core.allocator.faults import FAULTS
from tests.core.allocator.search import finds


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str) -> None:
    assert finds(name, phases=(Phase.generate,)) is not None

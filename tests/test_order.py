"""The longest files start first; a table that names files that are gone is noticed."""

from types import SimpleNamespace
from typing import Any

from tests.conftest import ROOT
from tests.order import SLOWEST, pytest_collection_modifyitems, sorted_files


def item(path: str, number: int, engine: bool = False) -> Any:
    marker = object() if engine else None
    return SimpleNamespace(nodeid=f"{path}::test_{number}", get_closest_marker=lambda name: marker)


FILES = {
    "tests/core/test_room.py": [item("tests/core/test_room.py", n) for n in range(2)],
    "tests/kernels/test_many.py": [item("tests/kernels/test_many.py", n) for n in range(9)],
    "tests/e2e/test_few.py": [item("tests/e2e/test_few.py", 0, engine=True)],
    "tests/" + SLOWEST[1]: [item("tests/" + SLOWEST[1], 0, engine=True)],
    "tests/e2e/test_more.py": [item("tests/e2e/test_more.py", n, n > 0) for n in range(4)],
    "tests/" + SLOWEST[0]: [item("tests/" + SLOWEST[0], 0, engine=True)],
}
SORTED = [
    *("tests/" + name for name in SLOWEST[:2]),
    "tests/e2e/test_more.py",
    "tests/e2e/test_few.py",
    "tests/kernels/test_many.py",
    "tests/core/test_room.py",
]


def test_slowest_then_engines_then_the_rest() -> None:
    assert sorted_files(FILES) == SORTED


def test_tests_of_a_file_stay_together_and_in_order() -> None:
    items = [each for items in FILES.values() for each in items]
    pytest_collection_modifyitems(SimpleNamespace(workerinput={}), items)  # type: ignore[arg-type]
    assert items == [each for path in SORTED for each in FILES[path]]


def test_one_process_keeps_pytests_order() -> None:
    items = [each for items in FILES.values() for each in items]
    before = list(items)
    pytest_collection_modifyitems(SimpleNamespace(), items)  # type: ignore[arg-type]
    assert items == before


def test_named_files_are_there() -> None:
    assert not [name for name in SLOWEST if not (ROOT / "tests" / name).is_file()]


def test_the_script_leaves_the_order_alone() -> None:
    """By itself pytest-xdist sorts files by their number of tests."""
    (line,) = [
        line
        for line in (ROOT / "scripts" / "test.sh").read_text().splitlines()
        if "--numprocesses" in line
    ]
    assert "--dist loadfile --no-loadscope-reorder" in line

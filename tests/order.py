"""With several workers, files that take longest start first, and small ones fill what is left.

pytest-xdist hands out whole files (``--dist loadfile``). Left to itself it starts with those of the
most tests: a file of two tests and two minutes comes last, when the other worker has nothing left.
"""

import pytest

SLOWEST = (
    "e2e/test_draft.py", "e2e/test_tensor_parallel.py", "gpu_path/test_engine.py",
    "e2e/test_who_gives_way.py", "gpu_path/test_late_device.py", "lab/test_serving.py",
    "e2e/test_decoding.py", "gpu_path/test_tensor_parallel.py", "lab/test_speculation.py",
    "kernels/test_sm90.py", "core/allocator/test_allocator.py",
)  # fmt: skip
"""Minutes each, roughly in order. A file that is missing here costs a tail at most."""


def sorted_files(files: dict[str, list[pytest.Item]]) -> list[str]:
    """Paths: `SLOWEST`, other files with engines, then the rest, those with most tests first."""

    def key(path: str) -> tuple[int, int]:
        slowest = [place for place, name in enumerate(SLOWEST) if path.endswith("/" + name)]
        if slowest:
            return 0, slowest[0]
        engines = sum(item.get_closest_marker("engine") is not None for item in files[path])
        return (1, -engines) if engines else (2, -len(files[path]))

    return sorted(files, key=key)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only in a worker: alone, pytest's own order shows small failures first."""
    if not hasattr(config, "workerinput"):
        return
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.nodeid.split("::")[0], []).append(item)
    items[:] = [item for path in sorted_files(files) for item in files[path]]

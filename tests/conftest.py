"""Fixtures shared by all tests."""

import os

# Read by vLLM at import: engine, scheduler and worker stay in the test process.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.heap import (
    modules_stay_apart,
    nobody_else_sets_apart,
    nothing_dies_at_the_limit,
    pytest_collection_finish,
)
from tests.needs import OPTIONAL, is_missing, needed
from tests.order import pytest_collection_modifyitems

__all__ = [
    "modules_stay_apart",
    "nobody_else_sets_apart",
    "nothing_dies_at_the_limit",
    "pytest_collection_finish",
    "pytest_collection_modifyitems",
]

if find_spec("hypothesis") is not None:  # a GPU machine may do without
    from hypothesis import HealthCheck, Phase, settings

    # For mutmut: whether a test fails is what counts, not by how little, and each time the same.
    settings.register_profile(
        "mutation", phases=(Phase.explicit, Phase.generate), derandomize=True, database=None,
        deadline=None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip

ROOT = Path(__file__).parent.parent
PROBE_MODEL = ROOT / "examples" / "probe-model"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's top folder."""
    return ROOT


@pytest.fixture(scope="session")
def probe_model() -> str:
    """Folder of the probe model."""
    return str(PROBE_MODEL)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let vLLM look at a model's class in this process, which is about to load it anyway.

    It would start a process for that, 10 s of processor time, for each class that the machine's
    cache of vLLM has not seen: on a new machine some twenty.
    """
    if item.get_closest_marker("engine") is not None:
        from vllm.model_executor.models import registry

        registry._run_in_subprocess = lambda function: function()


# --- without vLLM -------------------------------------------------------------------------

left_out: list[str] = []


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what cannot be imported here: see `tests.needs`."""
    file = collection_path / "conftest.py" if collection_path.is_dir() else collection_path
    if file.suffix != ".py" or not file.exists() or not any(map(is_missing, OPTIONAL)):
        return None
    if not any(map(is_missing, needed(file))):
        return None
    left_out.append(str(collection_path))
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out: a run that is green for want of tests must not look like one."""
    if left_out:
        missing = ", ".join(filter(is_missing, OPTIONAL))
        terminalreporter.write_line(
            f"{len(left_out)} files and folders of tests left out: not installed are {missing}"
        )

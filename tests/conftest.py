"""Fixtures shared by all tests."""

import os

# Read by vLLM at import: engine, scheduler and worker stay in the test process.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest

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

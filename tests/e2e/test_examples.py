"""examples/offline.py as a user runs it; test_server.py runs examples/client.py on its server."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine


def test_the_offline_example(root: Path) -> None:
    """In the tests' environment the engine stays in the example's process and starts sooner."""
    done = subprocess.run(
        [sys.executable, str(root / "examples" / "offline.py")],
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for line in ("a quarter kept: 4182907", "12 % kept: 7305514", "all kept: 2960183"):
        assert line in done.stdout
    assert "compressed: 2, served uncompressed: 1" in done.stdout

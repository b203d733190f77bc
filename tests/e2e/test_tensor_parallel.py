"""Two tensor-parallel ranks, one KV head each, give what one rank with both heads gives."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("tensor_parallel_run.py")


def run(model: str, num_ranks: int) -> dict[str, Any]:
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in range(num_ranks)),
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), model, str(num_ranks)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"tokens"')]
    return json.loads(line)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
def test_two_ranks_give_the_tokens_of_one(probe_model: str) -> None:
    one, two = run(probe_model, 1), run(probe_model, 2)
    assert two == one
    assert all(one["compressed"][policy] == 2 for policy in one["tokens"]), one["compressed"]

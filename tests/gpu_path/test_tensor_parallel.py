"""Two ranks on the GPU's path, one KV head each, say what one rank says on the CPU's."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lab.gpu_path.plugin import environment
from tests.forked import FORKED

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("tensor_parallel_run.py")


def run(root: Path, model: str, num_ranks: int, own: Mapping[str, str]) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, [str(root), own.get("PYTHONPATH")]))
    variables = {
        **own,
        "PYTHONPATH": path,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions of the script run in the ranks
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in range(num_ranks)),
    }
    done = subprocess.run(
        [sys.executable, str(FORKED), str(SCRIPT), model, str(num_ranks)],
        capture_output=True,
        text=True,
        timeout=900,
        env=variables,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"tokens"')]
    return json.loads(line)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
def test_two_ranks_say_what_one_cpu_rank_says(probe_model: str, root: Path, tmp_path: Path) -> None:
    cpu = run(root, probe_model, 1, os.environ)
    gpu = run(root, probe_model, 2, environment(tmp_path, "strided"))
    assert cpu["layouts"] != ["StridedLayout"] and cpu["launches"] == [{}]
    assert gpu["layouts"] == ["StridedLayout"] * 2
    expected = {"_stats_kernel", "_select_kernel", "_copy_kernel"}
    for launches in gpu["launches"]:
        assert expected | {"_ring_kernel", "_store_kernel", "_slots_kernel"} <= launches.keys()
    assert gpu["launches"][0] == gpu["launches"][1]
    assert gpu["tokens"] == cpu["tokens"]

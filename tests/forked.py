"""Runs vLLM with engine cores and workers that are forked, not spawned.

python forked.py SCRIPT ARGUMENTS
python forked.py serve MODEL OPTIONS

On a CPU vLLM spawns its processes, and each imports torch, transformers and vLLM anew: 12 s of
processor time apiece. Forked, as `vllm.LLM` does it on a GPU by default, they have them already.
`tests/e2e/test_server.py` and the scripts' own tests start their servers as a user does.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from vllm.platforms.cpu import CpuPlatform

FORKED = Path(__file__)


def fork_workers() -> None:
    """Undo the one setting with which the CPU's platform overrules the user's."""
    asked = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        asked(cls, config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def main() -> None:
    """Run what the arguments name."""
    fork_workers()
    del sys.argv[0]
    if sys.argv[0] == "serve":
        from vllm.entrypoints.cli.main import main as serve

        sys.argv.insert(0, "vllm")
        serve()
    else:
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()

"""Runs vLLM with engine cores and workers that are forked, not spawned.

python forked.py SCRIPT ARGUMENTS
python forked.py serve MODEL OPTIONS

On a CPU vLLM spawns its processes, and each imports torch, transformers and vLLM anew: 12 s of
processor time apiece. Forked, as `vllm.LLM` does it on a GPU by default, they have them already.
`tests/e2e/test_server.py` starts its servers as a user does. Where a script of ours starts them, it
is run with `plugin`.
"""

import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.platforms.cpu import CpuPlatform

FORKED = Path(__file__)


def fork_workers() -> None:
    """Undo the one setting with which the CPU's platform overrules the user's."""
    asked = CpuPlatform.check_and_update_config.__func__
    if asked.__module__ == __name__:  # plugins are loaded more than once
        return

    def check_and_update_config(cls: Any, config: Any) -> None:
        asked(cls, config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def plugin(folder: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """An environment in which every vLLM forks: `fork_workers` is one of its plugins there.

    Parameters
    ----------
    folder : pathlib.Path
        Where the plugin's metadata is written.
    environment : mapping, default os.environ
        What it is added to.
    """
    # Not above: this file is also run by itself, where `lab` is nowhere to be found.
    from lab.places import leave_entry_point

    target = f"{fork_workers.__module__}:{fork_workers.__name__}"
    leave_entry_point(folder, "kvcompress_forked", "vllm.general_plugins", target)
    path = [str(folder), str(FORKED.parents[1]), environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, path))}


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

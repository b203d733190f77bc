"""Compile kernels for an H200 (sm_90) on a machine without a GPU, and look at the result.

Run as a program, it imports the modules named on the command line, calls each one's
``sm90_launches()`` with launches replaced by compilations, and prints one JSON object: kernel name
-> list of {loads, stores, registers, stack}, one per compiled variant.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
COMPILED: dict[str, list[dict[str, Any]]] = {}


class _Driver:
    """What Triton asks a driver while it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes per thread; a stack other than 0 means spilled registers."""
    from triton.backends import nvidia

    tool = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "stack": int(stack)}


def _record(name: str, kernel: Any) -> None:
    ptx = kernel.asm["ptx"]
    COMPILED.setdefault(name, []).append(
        {
            "loads": sorted(
                set(re.findall(r"(?:ld\.global|cp\.async\.c[ag]\.shared\.global)\S*", ptx))
            ),
            "stores": sorted(set(re.findall(r"st\.global\S*", ptx))),
            "shared": kernel.metadata.shared,
            "mma": bool(re.search(r"wgmma|mma\.sync", ptx)),
            **_resources(kernel.asm["cubin"]),
        }
    )


def main(modules: list[str]) -> None:
    """Compile and print."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_Driver())
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        _record(self.fn.__name__, kernel)
        return kernel

    JITFunction.run = compile_only
    for module in modules:
        importlib.import_module(module).sm90_launches()
    sys.stdout.write(json.dumps(COMPILED) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

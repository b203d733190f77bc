"""Compile kernels for a GPU on a machine that has none, and look at the result.

    python -m tests.kernels.sm90 [--target 90] MODULE [MODULE ...]

imports the modules, calls each one's ``sm90_launches()`` with launches replaced by compilations,
and prints one JSON object: kernel name -> list of {loads, stores, registers, stack, shared, mma},
one per compiled variant. A target is a compute capability times ten: 90 is an H100 or an H200, 80
an A100, 100 a B200.

To import this turns Triton's interpreter off: tests, which need it, start it as a program.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)


FIRST_WITH_E4M3 = 89


def _dtype(argument: Any) -> Any:
    return getattr(argument, "dtype", None)


class _Driver:
    """What Triton asks a driver while it compiles."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return self.target  # variants are kept per device: one for each target

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.target, 32)


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes per thread; a stack other than 0 means spilled registers."""
    from triton.backends import nvidia

    tool = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    registers, stack = found.groups()
    return {"registers": int(registers), "stack": int(stack)}


def describe(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel needs, and how it moves data."""
    ptx = kernel.asm["ptx"]
    return {
        "loads": sorted(
            set(re.findall(r"(?:ld\.global|cp\.async\.c[ag]\.shared\.global)\S*", ptx))
        ),
        "stores": sorted(set(re.findall(r"st\.global\S*", ptx))),
        "shared": kernel.metadata.shared,
        "mma": bool(re.search(r"wgmma|mma\.sync|tcgen05\.mma", ptx)),
        **_resources(kernel.asm["cubin"]),
    }


def compile_instead(target: int, record: Callable[[str, Any], None]) -> None:
    """From now on, compile what would be launched, once, and call ``record(name, kernel)``."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_Driver(target))
    run = JITFunction.run
    seen: set[int] = set()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if target < FIRST_WITH_E4M3 and any("float8_e4m3" in str(_dtype(arg)) for arg in args):
            return None  # nor does vLLM serve such a cache there
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in seen:  # Triton keeps it
            seen.add(id(kernel))
            record(self.fn.__name__, kernel)
        return kernel

    JITFunction.run = compile_only


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--target", type=int, default=90)
    args = parser.parse_args()
    compiled: dict[str, list[dict[str, Any]]] = {}
    compile_instead(
        args.target, lambda name, kernel: compiled.setdefault(name, []).append(describe(kernel))
    )
    for module in args.modules:
        importlib.import_module(module).sm90_launches()
    sys.stdout.write(json.dumps(compiled) + "\n")


if __name__ == "__main__":
    main()

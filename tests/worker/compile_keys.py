"""Which variants of a kernel Triton would compile, worked out by Triton's own code without a GPU.

Triton compiles a kernel once per types of its arguments, per value of its constants and launch
options, and, of arguments that it specialises on, per whether a number is 1 or a multiple of 16 and
whether an address is a multiple of 16.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

BACKEND = CUDABackend(GPUTarget("cuda", 90, 32))
Key = tuple[tuple[str, Any], ...]


class CompileKeys:
    """Collects the keys of launches: pass `record` to `stand_in.replace_launches`."""

    def __init__(self) -> None:
        self.seen: dict[str, set[Key]] = {}
        self._binders: dict[Any, Any] = {}

    def record(self, kernel: Any, args: tuple, kwargs: dict) -> None:
        """Note the key of one launch."""
        function = kernel.fn
        if function not in self._binders:
            # Triton's interpreter keeps what the kernel was decorated with, but makes no keys.
            given = getattr(kernel, "kwargs", None)
            jitted = kernel if given is None else JITFunction(function, **given)
            binder = create_function_from_signature(
                inspect.signature(function), jitted.params, BACKEND
            )
            self._binders[function] = binder, [param.name for param in jitted.params]
        binder, names = self._binders[function]
        _, specialization, options = binder(*args, **kwargs)
        key = (*zip(names, specialization, strict=True), *sorted(options.items()))
        self.seen.setdefault(function.__name__, set()).add(key)

    def take(self) -> dict[str, set[Key]]:
        """What was seen since the last call."""
        seen, self.seen = self.seen, {}
        return seen


def unseen(run: Mapping[str, set[Key]], warmed: Mapping[str, set[Key]]) -> list[str]:
    """Keys of a run that the warm-up has not compiled, and how they differ from the nearest."""
    found = []
    for name, keys in run.items():
        for key in keys - warmed.get(name, set()):
            others = [
                [f"{a}: {y} -> {x}" for (a, x), (_, y) in zip(key, other, strict=True) if x != y]
                for other in warmed.get(name, ())
            ]
            found.append(f"{name}: {min(others, key=len) if others else 'never launched'}")
    return sorted(found)

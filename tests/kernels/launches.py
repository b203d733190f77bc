"""Counts what a call would launch on a GPU: Triton kernels, and operations of torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Views and allocations launch nothing.
_FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty",
    "permute", "select", "slice", "squeeze", "t", "transpose", "unsqueeze", "view", "_unsafe_view",
    "split", "unbind",
}  # fmt: skip


class LaunchCount(TorchDispatchMode):
    """Launches since it was entered.

    Attributes
    ----------
    kernels : int
        Triton kernels.
    operations : int
        Operations of torch that are neither views nor allocations.
    names : list[str]
        Both, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.operations = 0, 0
        self.names: list[str] = []
        self.is_launching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self.is_launching and name not in _FREE:
            self.operations += 1
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def count_launches() -> Iterator[LaunchCount]:
    """Count within a block, in the interpreter as on a GPU."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    count, saved = LaunchCount(), {}

    def counting(run: Any) -> Any:
        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            count.kernels += 1
            count.names.append(self.fn.__name__)
            count.is_launching = True  # what the interpreter does with torch is no launch
            try:
                return run(self, *args, **kwargs)
            finally:
                count.is_launching = False

        return counted

    for kind in (InterpretedFunction, JITFunction):
        saved[kind] = kind.run
        kind.run = counting(kind.run)
    try:
        with count:
            yield count
    finally:
        for kind, run in saved.items():
            kind.run = run

"""A stand-in for a GPU's queue: everything of the device happens as late as events allow.

An engine on the GPU's path of a CPU runs in it as it is. Launches of Triton kernels, torch
operations on the device's tensors, attention and copies are queued, and run when the host waits for
an event or reads a number of the device. Host code goes on meanwhile, and overwrites host memory
that a queued operation has still to read, as it can on a GPU.

Whose a tensor is: the device's, unless it came from numpy, from a factory that a model runner
called without a device, or from operations on such tensors alone. Host memory that kernels read in
place (``UvaBuffer``) is the same for both. A copy is late if it says `non_blocking`, whether its
source could be pinned here or not; other arguments of the host are taken as they are when an
operation is queued, as CUDA does with memory that is not pinned.
"""

import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from lab.gpu_path import backend

_FACTORIES = {
    torch.empty, torch.zeros, torch.ones, torch.full, torch.arange, torch.tensor, torch.as_tensor,
}  # fmt: skip
_READS = {"numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__"}


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> list[torch.Tensor]:
    return [each for each in tree_flatten(value)[0] if isinstance(each, torch.Tensor)]


class SharedBuffer:
    """Host memory that kernels read in place: vLLM's ``UvaBuffer`` where memory can be pinned."""

    device: "LateDevice"

    def __init__(self, size: Any, dtype: torch.dtype) -> None:
        self.np = np.zeros(size, torch.empty(0, dtype=dtype, device="cpu").numpy().dtype)
        self.cpu = torch.from_numpy(self.np)
        self.device.shared[_address(self.cpu)] = self.cpu

    def uva(self, n: int | None = None) -> torch.Tensor:
        return self.cpu[:n]


class LateEvent:
    """An event: waiting for it runs what was queued before it was recorded.

    There is one queue for all streams, in which everything is in order.
    """

    device: "LateDevice"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._position = 0

    def record(self, *args: Any) -> None:
        self._position = self.device.num_queued

    def wait(self, *args: Any) -> None:
        """Of another stream, which is the same queue here."""

    def synchronize(self) -> None:
        self.device.run_until(self._position)


class LateDevice:
    """The queue, and whose tensors are whose.

    Attributes
    ----------
    deferring : bool
        Whether operations are queued; else they run at once.
    shared : dict[int, torch.Tensor]
        Host memory that the device reads in place, by address.
    waits : Counter[str]
        Places in which the host waited for a number rather than for an event.
    num_queued : int
        Operations so far.
    longest : int
        The most operations that waited at once.
    """

    def __init__(self) -> None:
        self.deferring = False
        self.shared: dict[int, torch.Tensor] = {}
        self.waits: Counter[str] = Counter()
        self.num_queued = self.longest = 0
        self._host: dict[int, Any] = {}
        self._queue: deque[Callable[[], Any]] = deque()
        self._is_running = False

    # --- the queue ------------------------------------------------------------------------

    def put(self, operation: Callable[[], Any]) -> None:
        """Queue an operation; outside of `deferring`, and from within one, run it."""
        if not self.is_late:
            operation()
            return
        self._queue.append(operation)
        self.num_queued += 1
        self.longest = max(self.longest, len(self._queue))

    @property
    def is_late(self) -> bool:
        """Whether what is called now would be queued."""
        return self.deferring and not self._is_running

    def run_until(self, position: int) -> None:
        """Run the first `position` of all operations so far, as far as they have not run."""
        if self._is_running:
            return
        self._is_running = True
        try:
            with torch.inference_mode():
                while self._queue and self.num_queued - len(self._queue) < position:
                    self._queue.popleft()()
        finally:
            self._is_running = False

    def wait(self, why: str) -> None:
        """The host needs a number: run everything, and remember who asked."""
        if self._queue and not self._is_running:
            frames = traceback.extract_stack()
            ours = [each for each in frames if "vllm" in each.filename] or frames
            self.waits[f"{why} at {ours[-1].filename}:{ours[-1].lineno}"] += 1
            self.run_until(self.num_queued)

    # --- whose tensor ---------------------------------------------------------------------

    def is_host(self, tensor: torch.Tensor) -> bool:
        """Whether host code may look at it."""
        return _address(tensor) in self._host or _address(tensor) in self.shared

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Say that a tensor is the host's."""
        # Held: memory that is freed could come back as the device's.
        self._host[_address(tensor)] = tensor.untyped_storage()
        return tensor

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Say that a tensor is the device's."""
        self._host.pop(_address(tensor), None)
        return tensor

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """`to_host` of the kernels: memory of the host that is written late, and read as it is."""
        if not self.is_late:
            return tensor.clone()
        # Whoever reads before an event says that it is there finds this.
        out = self.to_host(torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu"))
        self.put(lambda: out.copy_(tensor))
        return out

    def _taken(self, value: Any, but: list[torch.Tensor]) -> Any:
        """Arguments as they are now, where they are the host's and not shared."""
        keep = {id(each) for each in but}

        def taken(tensor: torch.Tensor) -> torch.Tensor:
            is_private = _address(tensor) in self._host and _address(tensor) not in self.shared
            return tensor.clone() if is_private and id(tensor) not in keep else tensor

        return tree_map_only(torch.Tensor, taken, value)

    # --- operations -----------------------------------------------------------------------

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation of torch."""
        if not self.is_late:
            return func(*args, **kwargs)
        tensors = _tensors((args, kwargs))
        schema = func._schema
        is_written = any(a.alias_info and a.alias_info.is_write for a in schema.arguments)
        if not is_written and any(each.alias_info for each in schema.returns):
            return self._view(func, args, kwargs, tensors)
        if all(self.is_host(each) for each in tensors):
            mark = self.to_host if tensors else self.to_device
            out = func(*args, **kwargs)
            for each in _tensors(out):
                mark(each)
            return out
        if func is torch.ops.aten._local_scalar_dense.default:
            self.wait("a number is read")
            return func(*args, **kwargs)
        return (self._in_place if is_written else self._functional)(func, args, kwargs)

    def _view(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        """What may be a view. Where it is a copy, its numbers come later."""
        out = func(*args, **kwargs)
        is_copy = isinstance(out, torch.Tensor) and out.numel() > 0
        if not is_copy or _address(out) in {_address(each) for each in tensors}:
            return out
        if all(self.is_host(each) for each in tensors):
            return self.to_host(out)
        self.to_device(out)
        self.put(lambda: out.copy_(func(*args, **kwargs)))
        return out

    def _functional(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Hand out empty tensors; their numbers come later."""

        def like(tensor: torch.Tensor, device: str) -> torch.Tensor:
            return torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
            )

        meta_args, meta_kwargs = tree_map_only(
            torch.Tensor, lambda each: like(each, "meta"), (args, kwargs)
        )
        if "device" in kwargs:
            meta_kwargs = {**meta_kwargs, "device": torch.device("meta")}
        try:
            shapes = func(*meta_args, **meta_kwargs)
        except Exception:  # sizes depend on numbers: a wait on a GPU too
            self.wait(f"{func} needs numbers")
            return func(*args, **kwargs)
        outs = tree_map_only(torch.Tensor, lambda each: like(each, "cpu"), shapes)
        if not kwargs.get("non_blocking"):
            args, kwargs = self._taken((args, kwargs), [])

        def run() -> None:
            for out, made in zip(_tensors(outs), _tensors(func(*args, **kwargs)), strict=True):
                out.copy_(made)

        for each in _tensors(outs):
            self.to_device(each)
        self.put(run)
        return outs

    def _in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Queue it; give back the arguments that it says it gives back."""
        schema = func._schema
        named = dict(zip((each.name for each in schema.arguments), args, strict=False)) | kwargs
        written = {
            next(iter(each.alias_info.before_set)): named.get(each.name)
            for each in schema.arguments
            if each.alias_info and each.alias_info.is_write
        }
        targets = _tensors(list(written.values()))
        is_late = func is torch.ops.aten.copy_.default and len(args) > 2 and args[2]
        if targets and not is_late and all(self.is_host(each) for each in targets):
            self.wait(f"{func} into host memory")
            return func(*args, **kwargs)
        if not is_late:
            args, kwargs = self._taken((args, kwargs), targets)
        self.put(lambda: func(*args, **kwargs))
        found = [
            written[next(iter(each.alias_info.before_set))]
            for each in schema.returns
            if each.alias_info
        ]
        return found[0] if len(found) == 1 else tuple(found) or None


class _Dispatch(TorchDispatchMode):
    def __init__(self, device: LateDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.device.call(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What operators do not show: which device a caller names, and who looks at numbers."""

    def __init__(self, device: LateDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, device = kwargs or {}, self.device
        if not device.is_late:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func in _FACTORIES:
            where = kwargs.get("device")
            is_host = _in_runner() if where is None else isinstance(where, str) and where == "cpu"
            out = func(*args, **kwargs)
            return device.to_host(out) if is_host else out
        if args and isinstance(args[0], torch.Tensor):
            if name in _READS and not device.is_host(args[0]):
                device.wait(f".{name}()")
            elif name in ("to", "cpu"):
                return self._moved(func, name, args, kwargs)
        return func(*args, **kwargs)

    def _moved(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """``.to``: both sides are one device here, so torch itself would copy nothing."""
        device, source = self.device, args[0]
        where = kwargs.get("device", args[1] if len(args) > 1 else None)
        is_down = name == "cpu" or (isinstance(where, str) and where == "cpu")
        is_late = kwargs.get("non_blocking", False)
        if is_down and not device.is_host(source):
            out = torch.empty(source.shape, dtype=source.dtype, device="cpu")
            device.to_device(out).copy_(source)
            device.to_host(out)
            if not is_late:
                device.wait(f".{name}(cpu)")
            return out
        if isinstance(where, torch.device) and device.is_host(source):
            dtypes = [each for each in args[1:] if isinstance(each, torch.dtype)]
            dtype = kwargs.get("dtype") or next(iter(dtypes), source.dtype)
            out = device.to_device(torch.empty(source.shape, dtype=dtype, device=where))
            held = source if is_late else source.clone()
            device.put(lambda: out.copy_(held))
            return out
        return func(*args, **kwargs)


def _in_runner() -> bool:
    """Whether the caller is a model runner's code, which names a device where it means one."""
    frame = sys._getframe(2)
    while "/torch/" in frame.f_code.co_filename and frame.f_back is not None:
        frame = frame.f_back
    name = frame.f_code.co_filename
    return "/v1/worker/" in name or "vllm_kvcompress/" in name


@contextmanager
def late_device() -> Iterator[LateDevice]:
    """Engines opened inside run on it; `ready` them, then switch `deferring` on."""
    import vllm.v1.worker.cpu.shm  # noqa: F401  puts stand-ins for CUDA's events into torch
    from triton.runtime.interpreter import GridExecutor
    from vllm.v1.worker.gpu import buffer_utils

    from vllm_kvcompress.worker.compaction import faults
    from vllm_kvcompress.worker.draft import faults as draft_faults

    device = LateDevice()
    SharedBuffer.device = LateEvent.device = device
    from_numpy = torch.from_numpy

    def late(function: Callable[..., Any]) -> Callable[..., None]:
        return lambda *args, **kwargs: device.put(lambda: function(*args, **kwargs))

    replaced: list[tuple[Any, str, Any]] = [
        (buffer_utils, "is_uva_available", lambda: True),
        (buffer_utils, "UvaBuffer", SharedBuffer),
        (torch, "from_numpy", lambda array: device.to_host(from_numpy(array))),
        (faults, "to_host", device.copied),
        (draft_faults, "to_host", device.copied),
        (torch.cuda, "Event", LateEvent),
        (torch, "Event", LateEvent),
        # Whole: inside they look at numbers.
        (GridExecutor, "__call__", late(GridExecutor.__call__)),
        (backend, "paged_attention", late(backend.paged_attention)),
        (backend, "write_cache", late(backend.write_cache)),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(_Dispatch(device))
        stack.enter_context(_Functions(device))
        yield device


def ready(engine: Any) -> None:
    """Let attention layers call their backend themselves: vLLM's operator would hide its parts."""
    for layer in engine.runner.compilation_config.static_forward_context.values():
        layer.use_direct_call = True

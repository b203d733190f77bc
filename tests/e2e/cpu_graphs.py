"""A stand-in for CUDA graphs on a CPU: tapes of operators and of the tensors they were called with.

A tape is as strict as a graph. Replaying it calls the recorded operators on the recorded tensors
and leaves their results where they were when it was recorded; no Python of the model or of the
draft step runs. What was read from a tensor of one batch, or decided by Python, stays as it was.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from vllm_kvcompress.worker.draft import step as draft_step

_ALLOCATIONS = {getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "new_empty")}


class Tape(TorchDispatchMode):
    """Records what runs inside `with tape`; `replay` runs it again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, Any]] = []
        self._is_opaque = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if not self._is_opaque:
            assert all(
                each is None or isinstance(each, torch.Tensor) for each in tree_leaves(found)
            ), f"{func}: the host waits for the device in a capture"
            assert not str(func).startswith("vllm."), f"{func} would run Python in a replay"
            if func.overloadpacket in _ALLOCATIONS:
                found.zero_()  # once: replays find what the last one left, not new memory
            else:
                self.calls.append((func, args, kwargs, found))
        return found

    def record_whole(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Record a call of something that the dispatcher does not see, a Triton kernel."""
        self._is_opaque = True
        found = function(*args, **kwargs)
        self._is_opaque = False
        self.calls.append((function, args, kwargs, found))
        return found

    def replay(self) -> None:
        """What `torch.cuda.CUDAGraph.replay` does."""
        for function, args, kwargs, found in self.calls:
            args, kwargs = tree_map_only(torch.Tensor, _refreshed, (args, kwargs))
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeManager(CudaGraphManager):
    """vLLM's manager with tapes for graphs: its sizes, its order, its dispatch.

    Attributes
    ----------
    replays : list[int]
        Rows of the graphs that were replayed.
    """

    replays: list[int]

    def capture(self, create_forward_fn: Any, progress_bar_desc: str = "") -> None:
        self.replays = []
        for descs in self._capture_descs.values():
            for desc in descs:
                create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
                forward = create_forward_fn(desc, warmup=False)
                with Tape() as tape:
                    forward(CUDAGraphMode.NONE)
                self.graphs[desc] = tape
        self._graphs_captured = True

    def run_fullgraph(self, desc: Any) -> None:
        self.replays.append(desc.num_tokens)
        super().run_fullgraph(desc)


@contextmanager
def taped_graphs(runner: Any, sizes: list[int]) -> Iterator[TapeManager]:
    """Capture a CPU runner's draft steps on tapes, for batches of these sizes."""
    from vllm_kvcompress.worker.draft import speculator as view_speculator

    compilation = runner.compilation_config
    layers = runner.compacted_layers.by_name().values()
    speculator, sample = runner.speculator, draft_step.gumbel_sample

    def taped_sample(*args: Any, **kwargs: Any) -> torch.Tensor:
        mode = torch.utils._python_dispatch._get_current_dispatch_mode()
        if isinstance(mode, Tape) and not mode._is_opaque:
            return mode.record_whole(sample, *args, **kwargs)
        return sample(*args, **kwargs)

    with (
        patch.object(compilation, "cudagraph_capture_sizes", sizes),
        patch.object(compilation, "max_cudagraph_capture_size", max(sizes)),
        patch.object(type(current_platform), "get_global_graph_pool", lambda self: None),
        patch.object(CPUAttentionMetadataBuilder, "build", _build(CPUAttentionMetadataBuilder)),
        patch.object(draft_step, "gumbel_sample", taped_sample),
        patch.object(view_speculator, "CudaGraphManager", TapeManager),
    ):
        for layer in layers:
            layer.use_direct_call = True  # not through one operator that holds all the Python
        try:
            speculator.init_cudagraph_manager(CUDAGraphMode.FULL_AND_PIECEWISE)
            with torch.inference_mode():
                speculator.capture()
            yield speculator.cudagraph_manager
        finally:
            for layer in layers:
                layer.use_direct_call = False
            speculator.init_cudagraph_manager(CUDAGraphMode.NONE)


def _build(owner: type) -> Callable:
    """The CPU backend plans its work on the host, from the lengths, for each batch.

    GPU backends keep such plans in buffers that `build` refreshes; here the tape is told where
    the newest one of its batch size is.
    """
    original = owner.build

    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = original(self, *args, **kwargs)
        plans, num_reqs = self.__dict__.setdefault("plans", {}), len(metadata.seq_lens)
        metadata.scheduler_metadata.newest = (plans, num_reqs)
        plans[num_reqs] = metadata.scheduler_metadata
        return metadata

    return build


def _refreshed(tensor: torch.Tensor) -> torch.Tensor:
    plans, num_reqs = getattr(tensor, "newest", ({}, 0))
    return plans.get(num_reqs, tensor)

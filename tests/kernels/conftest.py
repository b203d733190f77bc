"""Kernels run in Triton's interpreter where there is no GPU."""

from tests.interpreter import mended_interpreter

__all__ = ["mended_interpreter"]

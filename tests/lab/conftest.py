"""Before Triton is imported: see tests/interpreter.py."""

from tests.interpreter import mended_interpreter

__all__ = ["mended_interpreter"]

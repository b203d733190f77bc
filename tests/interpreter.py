"""On a machine without a GPU, the kernels run in Triton's interpreter.

Triton 3.9's interpreter has two faults that no GPU has, mended here for the tests: it multiplies
the bits of bfloat16 matrices as if they were integers, and where rounding to an 8-bit float carries
into the exponent it loses the carry (1.99 becomes 1.0).
"""

from typing import Any

import numpy as np
import pytest
import torch

from vllm_kvcompress.host import cpu_triton

cpu_triton.register()  # before any test module imports Triton


@pytest.fixture(autouse=True, scope="session")
def mended_interpreter() -> None:
    """See above; for the conftest of folders whose tests launch kernels."""
    from triton import knobs

    if not knobs.runtime.interpret:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot
    convert = interpreter._convert_float
    eight_bits = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        data = convert(operand.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return multiply(self, widened(a), widened(b), *args)

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target in eight_bits:
            numbers = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
            return numbers.to(eight_bits[target]).view(torch.uint8).numpy()
        return convert(data, source, target, rounding)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert_float

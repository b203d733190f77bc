"""Kernels give the same bits in Triton's interpreter and in ours, which spares work."""

import contextlib
import dataclasses
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.interpreter import mended_interpreter

# isort: split
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic

from vllm_kvcompress.host.interpreter_speed import _OPERANDS, speed_up

__all__ = ["mended_interpreter"]

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="kernels are compiled here"
)


def copy_of_the_interpreter() -> Any:
    """Triton's module, loaded again: with none of what this package does to the one in use."""
    from triton.runtime import interpreter

    name = "triton.runtime.copied_interpreter"
    spec = importlib.util.spec_from_file_location(name, interpreter.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for it
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


@pytest.fixture(autouse=True)
def language_of_its_own() -> Iterator[None]:
    """Triton leaves tl.core replaced, and by parts of a copy here."""
    before = dict(vars(tl.core))
    yield
    vars(tl.core).update(before)


@contextlib.contextmanager
def language_as_it_came() -> Iterator[None]:
    """Within, the classes of Triton's language are its own, too: all interpreters share them."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (tl.core.tensor, tl.core.block_type):
            patch.setattr(kind, "__init__", inspect.unwrap(kind.__init__))
        for name in _OPERANDS:
            patch.setattr(TritonSemantic, name, inspect.unwrap(getattr(TritonSemantic, name)))
        yield


@pytest.fixture
def plain() -> Iterator[Any]:
    with language_as_it_came():
        yield copy_of_the_interpreter()


@pytest.fixture
def fast() -> Any:
    module = copy_of_the_interpreter()
    speed_up(module)
    return module


def _everything_kernel(x, y, z, halves, flags, count, N: tl.constexpr):
    """Integers of all signs, floats, bfloat16, masks, pointers, a loop and reductions."""
    row = tl.program_id(0)
    offset = row * N + tl.arange(0, N)
    number = tl.load(x + offset, mask=offset < count, other=-7)
    for step in range(3):
        number = number * 5 - step
    small = (number % 200 - 100).to(tl.int8)
    half = tl.load(halves + offset).to(tl.float32) * 1.5 + small
    tl.store(halves + offset, half.to(tl.bfloat16))
    total = tl.sum(number, axis=0) + tl.max(number.to(tl.int64), axis=0)
    tl.store(y + offset, number.to(tl.int64) << 3)
    tl.store(z + row, total)
    tl.store(flags + offset, (half > 0) & (number != 3))


def results(interpreter: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-999, 999, (64,), dtype=torch.int32, generator=generator)
    halves = torch.randn(64, generator=generator).bfloat16()
    y, z = torch.zeros(64, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    flags = torch.zeros(64, dtype=torch.bool)
    kernel = interpreter.InterpretedFunction(_everything_kernel)
    kernel.run(x, y, z, halves, flags, 60, N=16, grid=(4,), warmup=False)
    assert y.any() and z.any() and flags.any() and not flags.all()
    return [x, y, z, halves, flags]


def test_the_same_bits(fast: Any) -> None:
    with language_as_it_came():
        expected = results(copy_of_the_interpreter())
    # The second launch is the one that finds what the first has remembered.
    for one, other in zip(2 * expected, results(fast) + results(fast), strict=True):
        assert torch.equal(one, other)


def test_tensors_and_types_are_those_of_triton(fast: Any) -> None:
    """Attribute by attribute, and in a second one of the same shape no less than in the first."""

    def described() -> list[Any]:
        found: list[Any] = []
        for element in (tl.int32, tl.bfloat16, tl.pointer_type(tl.float16)):
            for shape in ([], [8], [tl.constexpr(4), 16], tl.tuple([8]), [1]):
                kind = tl.block_type(element, shape) if len(shape) else element
                tensor = tl.tensor("handle", kind)
                found.append([str(kind), kind.mangle(), kind.scalar == element])
                found[-1] += [getattr(kind, "numel", None), [*kind.shape] if len(shape) else []]
                found[-1] += [tensor.handle, tensor.type is kind, tensor.dtype is kind.scalar]
                found[-1] += [tensor.numel.value, [each.value for each in tensor.shape]]
                found[-1] += [[type(each).__name__ for each in tensor.shape], tensor.shape.type]
        return found

    with language_as_it_came():
        expected = described()
    assert described() == described() == expected
    for wrong in ([3], [], [0]):
        with pytest.raises((TypeError, ValueError)):
            tl.block_type(tl.int32, wrong)


def test_operands_become_what_triton_makes_of_them(fast: Any) -> None:
    """Types and numbers of both, or the words of the refusal; asked twice, as for tensors."""
    elements = (tl.int1, tl.uint8, tl.int32, tl.int64, tl.float16, tl.bfloat16, tl.float32)
    elements += (tl.float8e5, *map(tl.pointer_type, (tl.int32, tl.float16)))
    elements += (tl.pointer_type(tl.int32, "shared"),)  # of the same name as the other
    shapes = ((), (8,), (1, 8), (4, 1))
    flags = ((), (True, True), (True, False, False), (False, False, True, True))

    def operands(interpreter: Any) -> list[Any]:
        """Of every type and shape, and numbers."""
        made: list[Any] = [3, -1, 2.5, 2**40]
        for element in elements:
            for shape in shapes:
                data = np.full(shape or (1,), 1, interpreter._get_np_dtype(element))
                kind = tl.block_type(element, list(shape)) if shape else element
                handle = interpreter.TensorHandle(data, element)
                made.append(tl.tensor(handle, kind))
        return made

    def outcome(semantic: Any, one: Any, other: Any, flags: Any) -> Any:
        try:
            found = semantic.binary_op_type_checking_impl(one, other, *flags)
        except Exception as error:  # Triton's own, of several kinds
            return type(error).__name__, str(error)
        return [(str(each.type), each.handle.data.shape, each.handle.data.dtype) for each in found]

    def outcomes(interpreter: Any) -> list[Any]:
        semantic, made = interpreter.interpreter_semantic, operands(interpreter)
        pairs = itertools.product(made, made, flags)
        tensors = [each for each in pairs if tl.tensor in map(type, each[:2])]
        return [outcome(semantic, *each) for each in tensors]

    with language_as_it_came():
        expected = outcomes(copy_of_the_interpreter())
    assert len({str(each) for each in expected}) > 400
    assert outcomes(fast) == expected
    assert outcomes(fast) == expected


def test_a_member_that_changed_is_replaced_anew(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    results(fast)
    seen = []
    load = tl.load

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return load(*args, **kwargs)

    setattr(counted, tl.core.TRITON_BUILTIN, True)
    monkeypatch.setattr(tl, "load", counted)
    results(fast)
    assert seen


def test_the_language_is_restored() -> None:
    """By the interpreter in use, and what device functions need of it (tl.core) as well."""
    from triton.runtime import interpreter

    modules = (tl, tl.core, tl.math, tl.tensor)
    before = [dict(vars(module)) for module in modules]
    results(interpreter)
    for module, members in zip(modules, before, strict=True):
        assert not [name for name, each in members.items() if vars(module).get(name) is not each]


def launch_work(interpreter: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Members looked up, replaced anew and types of numpy built in a second launch."""
    results(interpreter)
    counts = [0, 0, 0]
    getmembers, table = interpreter.inspect.getmembers, interpreter.np.dtype

    def counted(number: int, function: Any) -> Any:
        def call(*args: Any) -> Any:
            counts[number] += 1
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.inspect, "getmembers", counted(0, getmembers))
        patch.setattr(interpreter.np, "dtype", counted(1, table))
        patch.setattr(interpreter, "_patch_attr", counted(2, interpreter._patch_attr))
        results(interpreter)
    return counts


def test_a_second_launch_looks_nothing_up(
    plain: Any, fast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert min(launch_work(plain, monkeypatch)) > 3
    assert launch_work(fast, monkeypatch) == [0, 0, 0]


def test_another_triton_is_left_as_it_is(plain: Any) -> None:
    plain._get_np_dtype = lambda dtype, strict: None
    before = dict(vars(plain))
    speed_up(plain)
    assert vars(plain) == before


def _overflow_kernel(x, y):
    tl.store(y, tl.load(x) * 2)


@pytest.mark.parametrize("debug", [False, True])
def test_overflow_is_found_where_triton_would_say_so(debug: bool) -> None:
    """Without debugging Triton computes whether it is there, and says nothing."""
    x, y = torch.tensor([2**30], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for change in (lambda module: None, speed_up):
        module = copy_of_the_interpreter()
        builder = module.interpreter_builder
        builder.options = dataclasses.replace(builder.options, debug=debug)
        change(module)
        kernel = module.InterpretedFunction(_overflow_kernel)
        if debug:
            with pytest.raises(module.InterpreterError, match="int32 overflow detected"):
                kernel.run(x, y, grid=(1,), warmup=False)
        else:
            kernel.run(x, y, grid=(1,), warmup=False)
            assert y.item() == -(2**31)

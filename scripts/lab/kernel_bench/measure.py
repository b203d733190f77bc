"""Checks and times of one row."""

import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lab.kernel_bench.device import DEVICE, ON_GPU  # first: before anything imports Triton
from lab.kernel_bench.inputs import Case, Shape
from lab.kernel_bench.rows import NOT_MEASURED, Result, Row, Times, difference

QUANTILES = (0.5, 0.2, 0.8)
ONE_RUN_MS = 500.0  # where a torch version takes longer, the check's run is its time


def outputs(case: Case, launch: Callable[[], Any], poisons: bool) -> list[torch.Tensor]:
    """What a launch wrote, as tensors that stay as they are.

    New memory is filled with NaN and the largest integers first, so that what a kernel leaves out
    shows.
    """
    if case.spoil:
        case.spoil()
    torch.use_deterministic_algorithms(poisons, warn_only=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            found = launch()
    finally:
        torch.use_deterministic_algorithms(False)
    if case.outputs:
        return list(case.outputs(found))
    return list(found) if isinstance(found, tuple) else [found]


def check(case: Case) -> tuple[float, float]:
    """Largest difference of a row from its torch version, and milliseconds the latter took."""
    found = outputs(case, case.kernel, poisons=True)
    synchronize()
    started = time.perf_counter()
    wanted = outputs(case, case.reference, poisons=False)
    synchronize()
    elapsed = (time.perf_counter() - started) * 1e3
    pairs = zip(found, wanted, strict=True)
    return max(difference(one, other) for one, other in pairs), elapsed


def synchronize() -> None:
    """Wait for the device."""
    if ON_GPU:
        torch.cuda.synchronize()


def measure(run: Callable[[], Any]) -> Times:
    """Time of a call: by events on a GPU, by the clock on the wall on a CPU."""
    if ON_GPU:
        from triton.testing import do_bench

        median, low, high = do_bench(run, warmup=20, rep=100, quantiles=list(QUANTILES))
        return median, low, high
    times: list[float] = []
    stop = time.perf_counter() + ONE_RUN_MS / 1e3
    while not times or (time.perf_counter() < stop and len(times) < 100):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    found = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor(QUANTILES).double())
    median, low, high = found.tolist()
    return median, low, high


def measure_copy() -> Times:
    """Milliseconds of a copy on the device, of `copy_bytes()` read and as many written."""
    source = torch.empty(copy_bytes(), dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return measure(lambda: target.copy_(source))


def copy_bytes() -> int:
    """1 GiB on a GPU, many times its L2 cache; 256 MiB on a CPU."""
    return 1 << (30 if ON_GPU else 28)


def measure_matmul() -> Times:
    """Milliseconds of a product of two square matrices of `matmul_size()` rows in bfloat16."""
    shape = (matmul_size(), matmul_size())
    one, other = (torch.ones(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    for matrix in (one, other):
        matrix.normal_()
    return measure(lambda: one @ other)


def matmul_size() -> int:
    """Large enough for a GPU's peak rate; small on a CPU."""
    return 8192 if ON_GPU else 512


def small_check(row: Row, seed: int, layout: str) -> float:
    """Difference at a small size with requests of different lengths; float32 on a CPU."""
    # Triton's interpreter multiplies the bits of bfloat16 matrices.
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    shape = Shape(row.small, 2, 4, 2, 8, 64, dtype=dtype, layout=layout, ragged=True)
    if row.most(shape):
        shape = replace(shape, batch=1)
    return check(row.make(shape, generator(seed)))[0]


def generator(seed: int) -> torch.Generator:
    """Random numbers on the device."""
    return torch.Generator(DEVICE).manual_seed(seed)


def too_large(need: int) -> str | None:
    """Why a size is not measured, if the device's free memory is the reason."""
    if not ON_GPU:
        return None
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    need += 1 << 30
    return f"skipped: needs {need / 2**30:.0f} GiB" if need > free else None


def run_size(result: Result, seed: int, with_torch: bool) -> None:
    """Check and time a row at one size; what went wrong, or was left out, is in its notes."""
    row, shape = result.row, result.shape
    ours = row.provider
    reason = row.most(shape) or too_large(row.memory(shape))
    if not ON_GPU and shape.tokens > row.cpu_tokens:
        reason = "skipped: slow on a CPU"
    if reason:
        result.notes = {ours: reason, "torch": reason}
        return
    case = row.make(shape, generator(seed))
    expected = 0.0
    if ON_GPU:
        try:
            result.error, expected = check(case)
        except torch.OutOfMemoryError:
            note = "out of memory: checked at the small size alone"
            result.notes = {ours: note, "torch": note}
        else:
            if not result.error <= row.tolerance:
                result.notes[ours] = f"WRONG by {result.error:.2g} at this size"
                return
        result.times[ours] = measure(case.kernel)
    else:
        result.notes[ours] = f"{NOT_MEASURED}: checked in the interpreter"
    if expected > ONE_RUN_MS:
        result.times["torch"] = (expected,) * 3
    elif with_torch and "torch" not in result.notes:
        result.times["torch"] = measure(case.reference)

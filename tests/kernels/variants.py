"""What is demanded of a compiled kernel, whatever it computes."""

from collections.abc import Mapping
from typing import Any

SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory that one block may have, bytes (CUDA's table of compute capabilities)."""

READ_ROWS = {
    "_stats_kernel", "_token_kernel", "_copy_kernel", "_rotate_kernel", "_unit_sum_kernel",
    "_similarity_kernel", "_lag_kernel", "_store_kernel", "_split_kernel", "_tail_kernel",
    "_length_kernel", "_latest_kernel", "_mean_kernel", "_key_sum_kernel",
}  # fmt: skip
WRITE_ROWS = {"_copy_kernel", "_rotate_kernel", "_store_kernel"}
"""Kernels that read, or write, rows of a cache or of queries: 16 bytes at a time."""


def is_bad(row: Mapping[str, Any]) -> bool:
    """Whether a row of `scripts/lab/compile_table.py` spills, does not fit, or is narrow."""
    kernel, target = row["kernel"], int(row["target"].removeprefix("sm_"))
    return (
        int(row["stack"]) > 0
        or int(row["shared"]) > SHARED[target]
        or (kernel in READ_ROWS and int(row["widest_load"]) < 16)
        or (kernel in WRITE_ROWS and int(row["widest_store"]) < 16)
    )

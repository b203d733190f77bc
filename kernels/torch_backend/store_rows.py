"""Scatter of a step's rows: torch version; see `vllm_kvcompress.kernels.cache.store_rows`."""

import torch

from vllm_kvcompress.kernels.cache.store_rows import check_rows


def store_rows(rows: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """As `vllm_kvcompress.kernels.cache.store_rows.store_rows`."""
    check_rows(rows, slots, out)
    slots = slots[: rows.shape[0]]
    used = slots >= 0
    out[slots[used]] = rows[used]

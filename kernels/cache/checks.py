"""What kernels refuse, in the same words on every device."""

import torch


def check_window(queries: torch.Tensor, num_requests: int, num_kv_heads: int, dim: int) -> None:
    """Refuse queries [R, w, H, D] that do not fit a cache.

    Raises
    ------
    ValueError
        If the number of requests or head_dim differ, or H is no multiple of KV.
    """
    if queries.shape[0] != num_requests or queries.shape[3] != dim:
        raise ValueError(
            f"queries {tuple(queries.shape)} do not fit {num_requests} requests of head_dim {dim}"
        )
    if queries.shape[2] % num_kv_heads:
        raise ValueError(
            f"{queries.shape[2]} query heads are no multiple of {num_kv_heads} KV heads"
        )


def check_rows(rows: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """Refuse what `store_rows` does not take.

    Raises
    ------
    ValueError
        If shapes, types or strides do not fit.
    """
    if rows.dtype != out.dtype or rows.shape[1:] != out.shape[1:]:
        raise ValueError(
            f"rows {tuple(rows.shape)} of {rows.dtype} do not fit {tuple(out.shape)} of {out.dtype}"
        )
    if slots.shape[0] < rows.shape[0]:
        raise ValueError(f"{rows.shape[0]} rows, but {slots.shape[0]} slots")
    if rows.stride(2) != 1 or not out.is_contiguous():
        raise ValueError("elements of a head must be neighbours in memory, and out contiguous")


def check_out(out: torch.Tensor, num_groups: int, num_entries: int) -> None:
    """Refuse an output that would be overrun.

    Raises
    ------
    ValueError
        Naming both shapes.
    """
    if out.shape[0] != num_groups or out.shape[1] < num_entries:
        raise ValueError(f"{num_groups} groups of {num_entries} do not fit {tuple(out.shape)}")


def check_ring(out: torch.Tensor, num_tokens: int, size: int) -> None:
    """Refuse what `ring_slots` does not take.

    Raises
    ------
    ValueError
        If `out` has fewer entries than there are tokens, or for a ring without any room.
    """
    if size < 1:
        raise ValueError(f"a ring holds at least one query per request, got {size}")
    if out.shape[0] < num_tokens:
        raise ValueError(f"{num_tokens} tokens do not fit {out.shape[0]} slots")

"""Attention over a GPU backend's paged cache in plain torch, one request after the other.

Dimensions: B blocks, H KV heads, N slots per block, D head_dim, Q query heads, T tokens of the
step, R requests, P blocks per table row.
"""

import torch


def write_cache(
    keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Put a step's keys and values into their slots.

    Parameters
    ----------
    keys, values : torch.Tensor
        [>= T, H, D]; rows behind T pad the batch.
    cache : torch.Tensor
        [B, H, N, 2 * D] with any strides, filled in place.
    slots : torch.Tensor
        [T] int64, block number times N plus offset; a negative one is skipped.
    """
    is_real = slots >= 0
    real = slots[is_real]
    rows = torch.cat([keys[: len(slots)], values[: len(slots)]], dim=-1)[is_real]
    size = cache.shape[2]
    cache[real // size, :, real % size] = rows.to(cache.dtype)


def paged_attention(
    queries: torch.Tensor,
    cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Causal attention; a request's queries are the last tokens of its sequence.

        out[t] = softmax(scale * queries[t] @ keys[: i + 1].T) @ values[: i + 1]

    with i the index of token t in the cache of its request.

    Parameters
    ----------
    queries : torch.Tensor
        [T, Q, D]; query head q reads KV head q * H // Q.
    cache : torch.Tensor
        [B, H, N, 2 * D], keys before values.
    query_start_loc : torch.Tensor
        [>= R + 1] int32.
    seq_lens : torch.Tensor
        [R] int32, tokens in the cache, the step's own included.
    block_table : torch.Tensor
        [>= R, P] int32.
    scale : float
        Softmax scale.
    out : torch.Tensor
        [T, Q, D], filled in place. Tokens of no request are left as they are.

    Raises
    ------
    ValueError
        If a request has more queries than tokens.
    """
    num_heads, size, head_dim = cache.shape[1], cache.shape[2], cache.shape[3] // 2
    starts = query_start_loc.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        first, end = starts[row], starts[row + 1]
        count = end - first
        if count == 0:
            continue
        if count > length:
            raise ValueError(f"row {row} has {count} queries and {length} tokens")
        blocks = block_table[row, : -(-length // size)].long()
        rows = cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length].float()  # [H, n, 2D]
        keys, values = rows[..., :head_dim], rows[..., head_dim:]
        own = queries[first:end].float().unflatten(1, (num_heads, -1))  # [t, H, Q / H, D]
        scores = torch.einsum("thgd,hnd->hgtn", own, keys) * scale
        indices = torch.arange(length, device=cache.device)
        is_later = indices > indices[length - count :, None]
        weights = scores.masked_fill(is_later, -torch.inf).softmax(dim=-1)
        found = torch.einsum("hgtn,hnd->thgd", weights, values)
        out[first:end] = found.flatten(1, 2).to(out.dtype)

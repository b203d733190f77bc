"""Copy surviving rows of paged caches to other pages: all layers and requests in one launch.

    destination slot t of (layer, request, head)  <-  source slot indices[layer, request, head, t]

A row is a token's key followed by its value, copied bit for bit. With a rotary embedding the key
is turned on the way by the difference between the position its new slot stands for and its own:

    key' = rotate(key, first_target[r] + t - indices[l, r, kv, t])

Dimensions: L layers, B blocks, KV key-value heads, N slots per block, C = 2 D row, D head_dim,
R requests, K survivors.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.cache.layer_caches import LayerCaches
from vllm_kvcompress.kernels.formulas.rotary import Rotary

_VARYING = ["num_requests", "num_survivors", "stride_source", "stride_destination"]
_PROGRAM_BYTES = 16 << 10  # 128 bytes, eight loads of 16, in flight per thread of 4 warps
_TURNED_BYTES, _TURNED_NUMBERS = 8 << 10, 4096  # of rows that are turned: more would spill


@triton.jit
def _row_offsets(
    cache_ptrs,  # [L]
    source_ptr,  # [R, P]
    destination_ptr,  # [R, Q]
    index_ptr,  # [L, R, KV, K]
    num_keep_ptr,  # [R]
    num_requests, num_survivors,
    stride_b, stride_h, stride_n, stride_source, stride_destination,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Layer's address; slots t, their sources' indices, offsets of both rows, and which count."""
    head = tl.program_id(1).to(tl.int64)
    layer = tl.program_id(2) // num_requests
    request = tl.program_id(2) % num_requests
    slots = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_kept = slots < tl.load(num_keep_ptr + request)
    place = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + head
    indices = tl.load(index_ptr + place * num_survivors + slots, mask=is_kept, other=0)
    old = tl.load(source_ptr + request * stride_source + indices // N, mask=is_kept, other=0)
    new = tl.load(
        destination_ptr + request * stride_destination + slots // N, mask=is_kept, other=0
    )
    source = old.to(tl.int64) * stride_b + head * stride_h + (indices % N) * stride_n
    destination = new.to(tl.int64) * stride_b + head * stride_h + (slots % N) * stride_n
    return tl.load(cache_ptrs + layer), slots, indices, source, destination, is_kept


@triton.jit
def _cache_at(address, sample_ptr):
    """Pointer from an address. Rows start at multiples of 16 bytes, which no compiler can see."""
    return tl.multiple_of(address.to(tl.pointer_type(sample_ptr.dtype.element_ty)), 16)


@triton.jit
def _copy_columns(cache, source, destination, is_kept, columns, C):
    """Copy some columns of rows."""
    mask = is_kept[:, None] & (columns < C)[None, :]
    rows = tl.load(cache + source[:, None] + columns[None, :], mask=mask)
    tl.store(cache + destination[:, None] + columns[None, :], rows, mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def _copy_kernel(
    sample_ptr,  # one of the caches, for its element type
    cache_ptrs, source_ptr, destination_ptr, index_ptr, num_keep_ptr,
    num_requests, num_survivors,
    stride_b, stride_h, stride_n, stride_source, stride_destination,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows of one head of one request in one layer."""
    address, _, _, source, destination, is_kept = _row_offsets(
        cache_ptrs, source_ptr, destination_ptr, index_ptr, num_keep_ptr, num_requests,
        num_survivors, stride_b, stride_h, stride_n, stride_source, stride_destination, N, BLOCK_T,
    )  # fmt: skip
    cache = _cache_at(address, sample_ptr)
    _copy_columns(cache, source, destination, is_kept, tl.arange(0, BLOCK_C), C)


@triton.jit(do_not_specialize=_VARYING)
def _rotate_kernel(
    sample_ptr,  # one of the caches, for its element type
    cache_ptrs, source_ptr, destination_ptr, index_ptr, num_keep_ptr,
    first_target_ptr,  # [R]
    inv_freq_ptr,  # [HALF]
    num_requests, num_survivors,
    stride_b, stride_h, stride_n, stride_source, stride_destination,
    LARGEST: tl.constexpr,  # largest finite number of the element type
    IS_NEOX: tl.constexpr,
    HALF: tl.constexpr,  # pairs
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As `_copy_kernel`, with the first 2 * HALF elements turned."""
    address, slots, indices, source, destination, is_kept = _row_offsets(
        cache_ptrs, source_ptr, destination_ptr, index_ptr, num_keep_ptr, num_requests,
        num_survivors, stride_b, stride_h, stride_n, stride_source, stride_destination, N, BLOCK_T,
    )  # fmt: skip
    cache = _cache_at(address, sample_ptr)
    first_target = tl.load(first_target_ptr + tl.program_id(2) % num_requests)
    pairs = tl.arange(0, BLOCK_P)
    inv_freq = tl.load(inv_freq_ptr + pairs, mask=pairs < HALF, other=0.0)
    angles = (first_target + slots - indices).to(tl.float32)[:, None] * inv_freq[None, :]
    cos, sin = tl.cos(angles), tl.sin(angles)
    if IS_NEOX:
        mask = is_kept[:, None] & (pairs < HALF)[None, :]
        old, new = cache + source[:, None], cache + destination[:, None]
        a = tl.load(old + pairs[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(old + HALF + pairs[None, :], mask=mask, other=0.0).to(tl.float32)
        first = tl.clamp(a * cos - b * sin, -LARGEST, LARGEST)
        second = tl.clamp(b * cos + a * sin, -LARGEST, LARGEST)
        tl.store(new + pairs[None, :], first.to(sample_ptr.dtype.element_ty), mask=mask)
        tl.store(new + HALF + pairs[None, :], second.to(sample_ptr.dtype.element_ty), mask=mask)
    else:
        columns = tl.arange(0, 2 * BLOCK_P)
        mask = is_kept[:, None] & (columns < 2 * HALF)[None, :]
        keys = tl.load(cache + source[:, None] + columns[None, :], mask=mask, other=0.0)
        a, b = tl.split(tl.reshape(keys.to(tl.float32), [BLOCK_T, BLOCK_P, 2]))
        turned = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [BLOCK_T, 2 * BLOCK_P])
        turned = tl.clamp(turned, -LARGEST, LARGEST).to(sample_ptr.dtype.element_ty)
        tl.store(cache + destination[:, None] + columns[None, :], turned, mask=mask)
    _copy_columns(cache, source, destination, is_kept, 2 * HALF + tl.arange(0, BLOCK_C), C)


def compact_pages(
    layers: LayerCaches,
    source_table: torch.Tensor,
    destination_table: torch.Tensor,
    indices: torch.Tensor,
    num_keep: torch.Tensor,
    first_target: torch.Tensor | None = None,
    rotary: Rotary | None = None,
) -> None:
    """Fill destination blocks with survivors. Source blocks are only read.

    Parameters
    ----------
    layers : LayerCaches
        L caches.
    source_table : torch.Tensor
        [R, P] int32, blocks of N slots that hold each request's tokens.
    destination_table : torch.Tensor
        [R, Q] int32, blocks that no other entry of either table names.
    indices : torch.Tensor
        [L, R, KV, K] int64 contiguous, survivors in the order they are written; entries from
        `num_keep` on are not looked at.
    num_keep : torch.Tensor
        [R] int32 on the caches' device, survivors of each request.
    first_target : torch.Tensor, optional
        [R] int32, index that slot 0 stands for; needed with `rotary`.
    rotary : Rotary, optional
        Turn keys by the distance they move. Not for keys before RoPE. In 8-bit caches, what a
        rotation takes beyond the largest number becomes that number.

    Raises
    ------
    ValueError
        If `indices` does not fit the layers, or `rotary` comes without `first_target`.
    """
    cache = layers.caches[0]
    num_kv_heads, block_size, width = cache.shape[1:]
    num_layers, num_requests, heads, num_survivors = indices.shape
    if (num_layers, heads) != (len(layers.caches), num_kv_heads) or not indices.is_contiguous():
        raise ValueError(
            f"indices {tuple(indices.shape)} do not fit {len(layers.caches)} layers of "
            f"{num_kv_heads} KV heads"
        )
    if (rotary is None) != (first_target is None):
        raise ValueError("rotary and first_target come together")
    block_c = triton.next_power_of_2(width)
    num_bytes = _PROGRAM_BYTES
    if rotary is not None:
        num_bytes = min(_TURNED_BYTES, _TURNED_NUMBERS * cache.element_size())
    block_t = max(num_bytes // (block_c * cache.element_size()), 1)
    grid = (triton.cdiv(num_survivors, block_t), num_kv_heads, num_layers * num_requests)
    common = (
        num_requests, num_survivors, *cache.stride()[:3],
        source_table.stride(0), destination_table.stride(0),
    )  # fmt: skip
    tables = (layers.pointers, source_table, destination_table, indices, num_keep)
    shape = {"N": block_size, "C": width, "BLOCK_T": block_t, "BLOCK_C": block_c}
    if rotary is None:
        _copy_kernel[grid](cache, *tables, *common, **shape, num_warps=4)
        return
    half = rotary.inv_freq.shape[0]
    _rotate_kernel[grid](
        cache, *tables, first_target, rotary.inv_freq, *common,
        LARGEST=torch.finfo(cache.dtype).max, IS_NEOX=rotary.is_neox, HALF=half,
        BLOCK_P=triton.next_power_of_2(half), **shape, num_warps=8,
    )  # fmt: skip

"""A small book of directions that stands for many vectors: a greedy cover of the similar ones.

    m[i]    = |x[i]|
    G[i, j] = cos(x[i], x[j]) > theta,  or i = j,  or x[i] and x[j] are equal in every element
    while a vector is left:
        e  = the vector that is G-adjacent to most of those left, the earliest of several
        e becomes the next entry; all that are left and adjacent to it get its number and leave

Vector i is then given back as x[entry] / |x[entry]| * m[i]. Entries are members, never means
(SpindleKV, arXiv 2507.06517, section on shallow layers; keys are taken before RoPE). Four launches
follow one another without the host:

* magnitudes;
* graph: cosines tile by tile, of which only one bit each is kept, and the degrees. Vectors are
  multiplied as they are and the product is divided by both lengths in float32: products of two
  16-bit floats are exact in float32, so tensor cores lose nothing here. float32 vectors are
  multiplied in full float32 (tf32 keeps 11 bits: an error of 1e-3, when 1 - theta is 0.02);
* cover: the loop above, one program per problem. When a vector leaves, each of its neighbours
  loses a degree, so each row of G is read once for that, and those of entries twice more;
* nearest: entries for what a full book left over, and the cosine of every vector to its entry.

Cost of a problem: n^2 D multiplications, and n^2 / 8 bytes for G. The cover's loop runs once per
entry that stands for more than itself; the others, which are last and have no neighbours left, are
appended together. A turn reads the n degrees twice and writes them once, meets two barriers and
waits for about five loads one after the other: some 3 us (reckoned, not measured). With n = 4096
and 2000 entries, were none of them alone, that makes 6 ms, 2 MB of G and 100 MB of degrees from the
caches of one multiprocessor; an H200 works on 132 problems side by side.

Dimensions: P problems, n vectors, D their length, E max_entries, W = ceil(n / 32) words of a row.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.codebook.book import SHORTEST, Codebook, check_vectors

IDENTICAL_FROM = 0.9999
"""Above it, rounding may hide that vectors are equal: they are compared element by element."""

COVER_BLOCKS = (256, 512, 1024, 2048, 4096)
"""Degrees the cover looks at together. Fewer than its 256 threads would read what one replaces."""

_MANY = 4096  # degrees for which twice the threads share a turn; then each holds half the rows

_ANY_SIZE = {  # what changes from request to request compiles nothing anew
    "do_not_specialize": ["num_places", "num_words", "max_entries"],
    "do_not_specialize_on_alignment": ["num_vectors_ptr"],
}


@triton.jit
def _tile(num_places, BLOCK: tl.constexpr):
    """Problem (int64) and first place of this program; neighbours share a problem's vectors."""
    tiles = tl.cdiv(num_places, BLOCK)
    return (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BLOCK


@triton.jit
def _load_vectors(vectors, places, valid, stride_n, dims, D):
    """[BLOCK, BLOCK_D] vectors at some places, zero where not valid."""
    at = places.to(tl.int64)[:, None] * stride_n + dims[None, :]
    return tl.load(vectors + at, mask=valid[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def _load_inverse(magnitude_row, places, valid):
    """[BLOCK] 1 / length, 0 for vectors of no length and where not valid."""
    magnitude = tl.load(magnitude_row + places, mask=valid, other=0.0)
    return tl.where(magnitude > 0, 1.0 / tl.where(magnitude > 0, magnitude, 1.0), 0.0)


@triton.jit(**_ANY_SIZE)
def _magnitude_kernel(
    vector_ptr,  # [P, n, D]
    num_vectors_ptr,  # [P]
    magnitude_ptr,  # [P, n] float32
    num_places, D, stride_p, stride_n, shortest,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Lengths of some vectors of one problem."""
    problem, start = _tile(num_places, BLOCK)
    places = start + tl.arange(0, BLOCK)
    valid = places < tl.load(num_vectors_ptr + problem)
    vectors = vector_ptr + problem * stride_p
    rows = _load_vectors(vectors, places, valid, stride_n, tl.arange(0, BLOCK_D), D).to(tl.float32)
    length = tl.sqrt_rn(tl.sum(rows * rows, 1))
    length = tl.where(length < shortest, 0.0, length)
    tl.store(magnitude_ptr + problem * num_places + places, length, mask=places < num_places)


@triton.jit(**_ANY_SIZE)
def _graph_kernel(
    vector_ptr,  # [P, n, D]
    magnitude_ptr,  # [P, n] float32
    num_vectors_ptr,  # [P]
    graph_ptr,  # [P, n, W] int32
    degree_ptr,  # [P, n] int32
    threshold, num_places, num_words, D, stride_p, stride_n,
    COMPARE: tl.constexpr,  # whether equal vectors must be found by their elements
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Neighbours of some vectors of one problem; rows of G from its length on are not written."""
    problem, start = _tile(num_places, BLOCK)
    count = tl.load(num_vectors_ptr + problem)
    rows = start + tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    vectors = vector_ptr + problem * stride_p
    magnitude_row = magnitude_ptr + problem * num_places
    mine = _load_vectors(vectors, rows, rows < count, stride_n, dims, D)
    inverse = _load_inverse(magnitude_row, rows, rows < count)
    graph_rows = graph_ptr + (problem * num_places + rows)[:, None] * num_words
    degree = tl.zeros([BLOCK], tl.int32)
    for first in range(0, tl.where(start < count, count, 0), BLOCK):
        columns = first + tl.arange(0, BLOCK)
        other = _load_vectors(vectors, columns, columns < count, stride_n, dims, D)
        across = _load_inverse(magnitude_row, columns, columns < count)
        products = tl.dot(mine, tl.trans(other), input_precision="ieee")
        # Lengths first, so that G is symmetric whatever is rounded.
        cosine = tl.minimum(products * (inverse[:, None] * across[None, :]), 1.0)
        near = (cosine > threshold) | ((inverse == 0)[:, None] & (across == 0)[None, :])
        near = near | (rows[:, None] == columns[None, :])
        if COMPARE:
            same = (rows < count)[:, None] & (columns < count)[None, :]
            for dim in range(D):
                of_row = vectors + rows.to(tl.int64) * stride_n + dim
                of_column = vectors + columns.to(tl.int64) * stride_n + dim
                left = tl.load(of_row, mask=rows < count)
                right = tl.load(of_column, mask=columns < count)
                same = same & (left[:, None] == right[None, :])
            near = near | same
        near = near & (rows < count)[:, None] & (columns < count)[None, :]
        degree += tl.sum(near.to(tl.int32), 1)
        bits = tl.reshape(near.to(tl.int32), [BLOCK, BLOCK // 32, 32])
        packed = tl.sum(bits << tl.arange(0, 32)[None, None, :], 2)
        words = first // 32 + tl.arange(0, BLOCK // 32)
        tl.store(
            graph_rows + words[None, :],
            packed.to(tl.int32),
            mask=(rows < count)[:, None] & (words < num_words)[None, :],
        )
    tl.store(degree_ptr + problem * num_places + rows, degree, mask=rows < num_places)


@triton.jit
def _degree_and_covered(degree_row, entry_row, places, num_places, count):
    """Degrees of the vectors at some places; and 1 for those adjacent to the entry, else 0."""
    degree = tl.load(degree_row + places, mask=places < num_places, other=0)
    word = tl.load(entry_row + places // 32, mask=places < count, other=0)
    return degree, (word >> (places % 32)) & 1


@triton.jit(**_ANY_SIZE)
def _cover_kernel(
    graph_ptr,  # [P, n, W] int32
    degree_ptr,  # [P, n] int32: neighbours that are left; becomes 0 when the vector leaves
    leaving_ptr,  # [P, n] int32: scratch
    num_vectors_ptr,  # [P]
    entries_ptr,  # [P, E] int32
    num_entries_ptr,  # [P] int32
    index_ptr,  # [P, n] int32: -1 for what is left when the book is full
    num_forced_ptr,  # [P] int32
    num_places, num_words, max_entries,
    BLOCK: tl.constexpr,
    BATCH: tl.constexpr,  # leaving vectors whose rows are read at once
):  # fmt: skip
    """The whole cover of one problem; barriers where threads read what others have stored."""
    problem = tl.program_id(0).to(tl.int64)
    count = tl.load(num_vectors_ptr + problem)
    graph = graph_ptr + problem * num_places * num_words
    degree_row = degree_ptr + problem * num_places
    leaving_row = leaving_ptr + problem * num_places
    index_row = index_ptr + problem * num_places
    entries_row = entries_ptr + problem * max_entries
    lanes = tl.arange(0, BLOCK)
    batch = tl.arange(0, BATCH)

    best = tl.zeros([BLOCK], tl.int32)  # largest degree each lane has met, and where first
    best_place = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_places, BLOCK):
        places = first + lanes
        tl.store(index_row + places, -1, mask=places < num_places)
        degree = tl.load(degree_row + places, mask=places < num_places, other=0)
        best_place = tl.where(degree > best, places, best_place)
        best = tl.maximum(best, degree)
    tl.debug_barrier()
    top = tl.max(best, 0)
    taken = 0
    while (top > 1) & (taken < max_entries):
        entry = tl.min(tl.where(best == top, best_place, num_places), 0)
        entry_row = graph + entry.to(tl.int64) * num_words
        tl.store(entries_row + taken, entry)
        num_leaving = 0
        for first in range(0, count, BLOCK):
            places = first + lanes
            degree, covered = _degree_and_covered(degree_row, entry_row, places, num_places, count)
            leaves = covered * (degree > 0).to(tl.int32)
            rank = num_leaving + tl.cumsum(leaves, 0) - 1
            tl.store(leaving_row + rank, places, mask=leaves > 0)
            tl.store(index_row + places, taken, mask=leaves > 0)
            num_leaving += tl.sum(leaves, 0)
        tl.debug_barrier()
        best = tl.zeros([BLOCK], tl.int32)
        for first in range(0, count, BLOCK):
            places = first + lanes
            degree, covered = _degree_and_covered(degree_row, entry_row, places, num_places, count)
            lost = tl.zeros([BLOCK], tl.int32)
            for start in range(0, num_leaving, BATCH):
                going = start + batch < num_leaving
                members = tl.load(leaving_row + start + batch, mask=going, other=0).to(tl.int64)
                words = tl.load(
                    graph + members[:, None] * num_words + (places // 32)[None, :],
                    mask=going[:, None] & (places < count)[None, :],
                    other=0,
                )
                lost += tl.sum((words >> (places % 32)[None, :]) & 1, 0).to(tl.int32)
            gone = (degree == 0) | (covered > 0)
            degree = tl.where(gone, 0, tl.maximum(degree - lost, 1))  # what is left has itself
            tl.store(degree_row + places, degree, mask=places < num_places)
            best_place = tl.where(degree > best, places, best_place)
            best = tl.maximum(best, degree)
        top = tl.max(best, 0)
        taken += 1
        tl.debug_barrier()
    # What is left has no neighbour but itself, or the book is full.
    for first in range(0, count, BLOCK):
        places = first + lanes
        alone = tl.load(degree_row + places, mask=places < num_places, other=0) > 0
        number = taken + tl.cumsum(alone.to(tl.int32), 0) - 1
        fits = alone & (number < max_entries)
        tl.store(entries_row + number, places, mask=fits)
        tl.store(index_row + places, number, mask=fits)
        taken += tl.sum(alone.to(tl.int32), 0)
    num_entries = tl.minimum(taken, max_entries)
    tl.store(num_entries_ptr + problem, num_entries)
    tl.store(num_forced_ptr + problem, taken - num_entries)
    for first in range(num_entries, max_entries, BLOCK):
        tl.store(entries_row + first + lanes, -1, mask=first + lanes < max_entries)


@triton.jit(**_ANY_SIZE)
def _nearest_kernel(
    vector_ptr,  # [P, n, D]
    magnitude_ptr,  # [P, n] float32
    num_vectors_ptr,  # [P]
    entries_ptr,  # [P, E] int32
    num_entries_ptr,  # [P] int32
    index_ptr,  # [P, n] int32: -1 is replaced
    cosine_ptr,  # [P, n] float32
    num_places, max_entries, D, stride_p, stride_n,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Entry numbers that are missing among some vectors, and the cosines of all of those."""
    problem, start = _tile(num_places, BLOCK)
    count = tl.load(num_vectors_ptr + problem)
    num_entries = tl.load(num_entries_ptr + problem)
    places = start + tl.arange(0, BLOCK)
    valid = places < count
    dims = tl.arange(0, BLOCK_D)
    vectors = vector_ptr + problem * stride_p
    magnitude_row = magnitude_ptr + problem * num_places
    entries_row = entries_ptr + problem * max_entries
    mine = _load_vectors(vectors, places, valid, stride_n, dims, D)
    inverse = _load_inverse(magnitude_row, places, valid)
    index = tl.load(index_ptr + problem * num_places + places, mask=valid, other=0)
    tl.debug_barrier()  # several threads read the same number, and one of them replaces it
    forced = index < 0
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, tl.where(tl.max(forced.to(tl.int32), 0) > 0, num_entries, 0), BLOCK):
        numbers = first + tl.arange(0, BLOCK)
        filled = numbers < num_entries
        members = tl.load(entries_row + numbers, mask=filled, other=0)
        other = _load_vectors(vectors, members, filled, stride_n, dims, D)
        products = tl.dot(mine, tl.trans(other), input_precision="ieee")
        products = products * _load_inverse(magnitude_row, members, filled)[None, :]
        products = tl.where(filled[None, :], products, float("-inf"))
        top = tl.max(products, 1)
        number = tl.min(tl.where(products == top[:, None], numbers[None, :], max_entries), 1)
        index = tl.where(forced & (top > highest), number, index)
        highest = tl.maximum(highest, top)
    # Only a vector with NaN has no nearest entry; -1 would be followed out of bounds.
    index = tl.maximum(index, 0)
    members = tl.load(entries_row + index, mask=valid, other=0)
    other = _load_vectors(vectors, members, valid, stride_n, dims, D).to(tl.float32)
    across = _load_inverse(magnitude_row, members, valid)
    cosine = tl.sum(mine.to(tl.float32) * other, 1) * (inverse * across)
    cosine = tl.minimum(tl.maximum(cosine, -1.0), 1.0)
    exact = (members == places) | ((inverse == 0) & (across == 0))
    at = problem * num_places + places
    cosine = tl.where(valid, tl.where(exact, 1.0, cosine), 0.0)
    tl.store(cosine_ptr + at, cosine, mask=places < num_places)
    tl.store(index_ptr + at, tl.where(valid, index, -1), mask=places < num_places)


def build_codebook(
    vectors: torch.Tensor, num_vectors: torch.Tensor, threshold: float, max_entries: int
) -> Codebook:
    """Cover each problem's vectors by as few of them as the greedy rule finds.

    Parameters
    ----------
    vectors : torch.Tensor
        [P, n, D] float32, float16 or bfloat16, elements of a vector being neighbours: a problem
        per request, layer, KV head and kind (keys before RoPE, values). Lengths from `SHORTEST`
        to 1e18; shorter vectors count as zero. The cosine of a zero vector is 0 with all others,
        but zero vectors are adjacent to each other.
    num_vectors : torch.Tensor
        [P] int32, vectors of each problem; at most n.
    threshold : float
        theta. At 1.0 every distinct vector is an entry of its own and equal ones share one.
        Between cosines that differ from theta by less than 1e-6, rounding decides.
    max_entries : int
        E, at least 1. Vectors without an entry when that many are chosen get the nearest one (of
        equally near ones the first).

    Returns
    -------
    Codebook
        Nothing of it has been waited for.

    Raises
    ------
    ValueError
        For vectors, or a number of entries, that it does not take.
    """
    check_vectors(vectors, num_vectors, max_entries)
    num_problems, num_places, dim = vectors.shape
    num_words = triton.cdiv(num_places, 32)
    block_d = max(triton.next_power_of_2(dim), 16)
    compare = threshold >= IDENTICAL_FROM
    block = 64 if compare or block_d > 128 else 128
    num_warps = 16
    if vectors.dtype == torch.float32:
        # Without tensor cores, threads hold whole vectors; larger tiles would spill.
        block, num_warps = 32, 4
    shape = {"BLOCK": block, "BLOCK_D": block_d}
    grid = (triton.cdiv(num_places, block) * num_problems,)
    strides = vectors.stride()[:2]
    magnitude = torch.empty(num_problems, num_places, dtype=torch.float32, device=vectors.device)
    cosine = torch.empty_like(magnitude)
    degree, leaving, index = (torch.empty_like(cosine, dtype=torch.int32) for _ in range(3))
    graph = degree.new_empty(num_problems, num_places, num_words)
    entries = degree.new_empty(num_problems, max_entries)
    num_entries, num_forced = degree.new_empty(num_problems), degree.new_empty(num_problems)
    _magnitude_kernel[grid](
        vectors, num_vectors, magnitude, num_places, dim, *strides, SHORTEST, **shape)  # fmt: skip
    _graph_kernel[grid](
        vectors, magnitude, num_vectors, graph, degree,
        threshold, num_places, num_words, dim, *strides,
        COMPARE=compare, **shape, num_warps=num_warps,
    )  # fmt: skip
    cover_block = next((size for size in COVER_BLOCKS if size >= num_places), COVER_BLOCKS[-1])
    _cover_kernel[(num_problems,)](
        graph, degree, leaving, num_vectors, entries, num_entries, index, num_forced,
        num_places, num_words, max_entries,
        BLOCK=cover_block,
        BATCH=4 if cover_block == _MANY else 8, num_warps=16 if cover_block == _MANY else 8,
    )  # fmt: skip
    _nearest_kernel[(triton.cdiv(num_places, min(block, 64)) * num_problems,)](
        vectors, magnitude, num_vectors, entries, num_entries, index, cosine,
        num_places, max_entries, dim, *strides, BLOCK=min(block, 64), BLOCK_D=block_d, num_warps=8,
    )  # fmt: skip
    return Codebook(entries, num_entries, index, magnitude, cosine, num_forced)

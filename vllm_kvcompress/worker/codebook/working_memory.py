"""Device memory that codebooks need while they are made; see compaction/working_memory.py."""

from vllm_kvcompress.kernels.codebook.coded_tokens import books_at_once, graph_bytes
from vllm_kvcompress.plans import GroupLengths
from vllm_kvcompress.worker.codebook.writer import MAX_COPY_BYTES
from vllm_kvcompress.worker.compaction.working_memory import RankShape

_BOOK_COPIES, _GRAPH_COPIES = 9, 2
"""Copies in float32 of the survivors' keys or values that are held at once: while they are turned
and written, and beside graphs.
"""

_CODE_BYTES = 3 * 2 * (8 + 4 + 4)
"""Of a token's number, length and half of its position, of keys and values, in three copies."""


def coding_bytes(lengths: GroupLengths, shape: RankShape, num_layers: int) -> int:
    """Bytes, from above, while the survivors of one request are made into books.

    The most of three moments that follow each other: the copy of one layer's prompt from which
    survivors are gathered; survivors as they are turned, made into entries and written; graphs of
    similar vectors. Where a book is extended: the book, and how similar each new token and each
    entry are. `num_layers` layers of the rank have these lengths. 0 without a book.
    """
    if lengths.book is None:
        return 0
    itemsize, heads, count = shape.cache_dtype.itemsize, shape.num_kv_heads, lengths.num_survivors
    survivors = count * heads * shape.head_dim
    together = min(max(MAX_COPY_BYTES // (survivors * (2 * itemsize + 4)), 1), num_layers)
    if lengths.coded_before:
        return _extending_bytes(lengths, shape, together * heads)
    gathered = together * survivors * 2 * itemsize
    prompt = 2 * 2 * lengths.region_len * heads * shape.head_dim * itemsize  # read, then gathered
    copies = 4 * together * survivors
    graphs = books_at_once(together * heads, count) * graph_bytes(count)
    return max(
        prompt + gathered,
        gathered + _BOOK_COPIES * copies,
        2 * gathered + _GRAPH_COPIES * copies + graphs,
    )


def _extending_bytes(lengths: GroupLengths, shape: RankShape, num_books: int) -> int:
    assert lengths.book is not None
    new, entries = lengths.region_len - lengths.held_before, lengths.book.num_entries
    vectors = 4 * shape.head_dim * (_BOOK_COPIES * entries + _BOOK_COPIES * new)
    similar = 2 * 4 * new * entries  # and without unused entries
    codes = _CODE_BYTES * lengths.book.num_tokens
    graphs = books_at_once(num_books, new) * graph_bytes(new)
    return num_books * (vectors + similar + codes) + graphs

"""Device memory that codebooks need while they are made; see compaction/working_memory.py."""

from vllm_kvcompress.kernels.codebook.coded_tokens import MAX_GRAPH_BYTES
from vllm_kvcompress.plans import GroupLengths
from vllm_kvcompress.worker.codebook.writer import MAX_COPY_BYTES
from vllm_kvcompress.worker.compaction.working_memory import RankShape

_BOOK_COPIES = 9
"""Copies in float32 of the survivors' keys or values that are held at once while they are coded."""


def coding_bytes(lengths: GroupLengths, shape: RankShape, num_layers: int) -> int:
    """Bytes, from above, while the survivors of one request are made into books.

    A copy of one layer's prompt, survivors as they are made into entries and codes, and graphs of
    similar vectors; `num_layers` layers of the rank have these lengths. 0 without a book.
    """
    if lengths.book is None:
        return 0
    itemsize, heads = shape.cache_dtype.itemsize, shape.num_kv_heads
    prompt = 2 * 2 * lengths.region_len * heads * shape.head_dim * itemsize  # read, then gathered
    survivors = lengths.num_survivors * heads * shape.head_dim
    together = min(max(MAX_COPY_BYTES // (survivors * (2 * itemsize + 4)), 1), num_layers)
    problems = together * heads
    graph = problems * lengths.num_survivors**2 // 8
    if graph > MAX_GRAPH_BYTES:
        graph = max(MAX_GRAPH_BYTES, lengths.num_survivors**2 // 8)
    copies = together * survivors * (2 * itemsize + 4 * _BOOK_COPIES)
    return prompt + copies + graph

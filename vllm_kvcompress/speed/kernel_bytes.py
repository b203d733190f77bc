"""What the kernels of a compaction move, compute and launch: pure arithmetic.

Inputs are counted as often as the kernel's docstring says they are read, outputs once, in full.
What stays between a function's own launches, block tables and lengths are left out.

Symbols: n tokens of one layer and request, H query heads, KV key-value heads, D head_dim, e bytes
per number of the cache, w queries, L layers, K kept tokens.
"""

from dataclasses import dataclass

SMALLEST_WINDOW = 8
"""As in ``kernels/scores/window.py``, which needs Triton to be imported; a test compares them."""


@dataclass(frozen=True)
class Heads:
    """Heads of one layer on one worker.

    Attributes
    ----------
    heads, kv_heads, head_dim : int
        H, KV, D.
    element : float
        e.
    """

    heads: int
    kv_heads: int
    head_dim: int
    element: float

    @property
    def row(self) -> float:
        """Bytes of one token's keys, all KV heads."""
        return self.kv_heads * self.head_dim * self.element

    @property
    def query(self) -> float:
        """Bytes of one token's queries."""
        return self.heads * self.head_dim * self.element


@dataclass(frozen=True)
class Launch:
    """One call of a launcher.

    Attributes
    ----------
    read, written : float
        Bytes.
    flops : float
        Of matrix products.
    kernels : int
        Triton kernels that it launches.
    operations : int
        Tensor operations of torch beside them.
    """

    read: float
    written: float
    flops: float = 0.0
    kernels: int = 1
    operations: int = 0

    @property
    def num_bytes(self) -> float:
        """Bytes read and written."""
        return self.read + self.written


def takes_window_size(window_size: int) -> bool:
    """Whether `window_scores` takes windows of that many tokens: powers of two from 8 on."""
    return window_size >= SMALLEST_WINDOW and window_size & (window_size - 1) == 0


def token_scores(h: Heads, num_tokens: int, num_queries: int) -> Launch:
    """Keys and queries twice: 2 n KV D e + 2 w H D e read, 4 KV n written."""
    read = 2 * num_tokens * h.row + 2 * num_queries * h.query
    flops = 2 * 2 * num_queries * h.heads * num_tokens * h.head_dim
    return Launch(read, 4 * h.kv_heads * num_tokens, flops, kernels=3)


def head_scores(h: Heads, num_tokens: int, num_queries: int) -> Launch:
    """`token_scores` for every query head alone: the keys H / KV times as often.

    Beside it, block table and lengths are repeated, and scores brought in order.
    """
    flops, scores = token_scores(h, num_tokens, num_queries).flops, 4 * h.heads * num_tokens
    read = 2 * num_tokens * h.row * h.heads / h.kv_heads + 2 * num_queries * h.query + scores
    return Launch(read, 2 * scores, flops, kernels=3, operations=3)


def window_scores(h: Heads, num_tokens: int, num_queries: int, window_size: int) -> Launch:
    """Keys and queries once: n KV D e + w H D e read, a number per window and KV head written."""
    windows = -(-num_tokens // window_size)
    read = num_tokens * h.row + num_queries * h.query
    flops = 2 * num_queries * h.heads * num_tokens * h.head_dim
    return Launch(read, 4 * h.kv_heads * windows, flops, kernels=3)


def attention_sums(h: Heads, num_tokens: int, num_queries: int) -> Launch:
    """Attention of all queries of a chunk, the last of n tokens: keys and queries twice.

    2 n KV D e + 2 w H D e read, 4 KV n written; a query and a key that it does not see count not.
    """
    pairs = num_queries * (num_tokens - num_queries) + num_queries * (num_queries + 1) // 2
    read = 2 * num_tokens * h.row + 2 * num_queries * h.query
    flops = 2 * 2 * h.heads * h.head_dim * pairs
    return Launch(read, 4 * h.kv_heads * num_tokens, flops, kernels=3)


def key_redundancy(h: Heads, num_tokens: int) -> Launch:
    """Keys four times, and products of all pairs at most: 2 n^2 D FLOPs per KV head.

    Lengths of 4 and exempted sums of 8 bytes per token are written and read on the way.
    """
    between = 12 * h.kv_heads * num_tokens
    read, written = 4 * num_tokens * h.row + between, between + 4 * h.kv_heads * num_tokens
    flops = 2 * h.kv_heads * num_tokens**2 * h.head_dim
    return Launch(read, written, flops, kernels=4, operations=2)


def key_similarity(h: Heads, num_tokens: int) -> Launch:
    """Keys twice; a sum over splits in between."""
    return Launch(2 * num_tokens * h.row, 4 * h.kv_heads * num_tokens, kernels=2, operations=1)


def lag_scores(h: Heads, num_tokens: int) -> Launch:
    """Keys and values once, as the second reading of a block is in the L2 cache."""
    return Launch(2 * num_tokens * h.row, 4 * h.kv_heads * num_tokens)


def select_tokens(h: Heads, num_layers: int, num_tokens: int, num_keep: int) -> Launch:
    """Scores five times, forced tokens once; an index of 8 bytes per survivor."""
    read = num_layers * h.kv_heads * 5 * 4 * num_tokens + num_tokens
    return Launch(read, num_layers * h.kv_heads * 8 * num_keep)


def compact_pages(h: Heads, num_layers: int, num_keep: int) -> Launch:
    """Keys, values and indices of survivors; keys and values written."""
    rows = num_layers * num_keep * 2 * h.row
    return Launch(rows + num_layers * num_keep * 8 * h.kv_heads, rows)


def store_rows(h: Heads, num_tokens: int, num_stored: int) -> Launch:
    """A slot of 8 bytes per token; kept queries, read and written."""
    rows = num_stored * h.query
    return Launch(8 * num_tokens + rows, rows)


def build_codebook(h: Heads, num_vectors: int) -> Launch:
    """Keys and values of one layer: per KV head its vectors three times, and a bit per pair.

    2 KV (3 n D e + 3 n^2 / 16 + 16 n) in all: the graph is written and half of it read again.
    """
    n, problems = num_vectors, 2 * h.kv_heads
    read = problems * (3 * n * h.head_dim * h.element + n * n // 16 + 12 * n)
    flops = problems * 2 * n * n * h.head_dim
    return Launch(read, problems * (n * n // 8 + 4 * n), flops, kernels=4)

"""Cached tokens of several requests in one layer, measured in place by Triton kernels.

The first request that asks for a measurement has it made for all of them in one launch; the others
find theirs done. A batch lives for one layer of one step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.cache.rows import CacheRows, window_means
from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms
from vllm_kvcompress.kernels.scores.heads import head_scores
from vllm_kvcompress.kernels.scores.keys import key_similarity, lag_scores
from vllm_kvcompress.kernels.scores.prompt import prompt_attention_sums
from vllm_kvcompress.kernels.scores.redundancy import key_redundancy
from vllm_kvcompress.kernels.scores.window import takes_window_size, token_scores, window_scores


@dataclass
class PagedBatch:
    """One layer's pages of R requests that are scored by the same policy.

    Attributes
    ----------
    pages : Pages
        Where their tokens are.
    lengths : list[int]
        `pages.num_tokens` on the host.
    queries : torch.Tensor or None
        [R, w, H, D] after RoPE, of each request's last w tokens.
    scale : float
        Softmax scale of the layer.
    terms : SoftmaxTerms
        Its soft cap and sinks.
    """

    pages: Pages
    lengths: list[int]
    queries: torch.Tensor | None
    scale: float
    terms: SoftmaxTerms = PLAIN
    _done: dict[tuple, torch.Tensor] = field(default_factory=dict)

    def rows(self) -> list["PagedRows"]:
        """Every request's rows."""
        return [PagedRows(self, request) for request in range(len(self.lengths))]

    def attention(self, num_queries: int) -> torch.Tensor:
        """[R, KV, max_tokens]: see `CacheRows.attention`."""
        last = self._last(num_queries)
        return self._once(
            ("attention", num_queries),
            lambda: token_scores(last, self.pages, self.scale, self.terms),
        )

    def head_attention(self, num_queries: int) -> torch.Tensor:
        """[R, H, max_tokens]: see `CacheRows.head_attention`."""
        last = self._last(num_queries)
        return self._once(
            ("head_attention", num_queries),
            lambda: head_scores(last, self.pages, self.scale, self.terms),
        )

    def attention_sums(self) -> torch.Tensor:
        """[R, KV, max_tokens]: see `CacheRows.attention_sums`."""
        assert self.queries is not None
        queries = self.queries
        return self._once(
            ("attention_sums",),
            lambda: prompt_attention_sums(queries, self.pages, self.scale, self.terms),
        )

    def window_attention(self, window_size: int) -> torch.Tensor:
        """[R, KV, windows]: see `CacheRows.window_attention`; for sizes the kernel takes."""
        assert self.queries is not None
        queries = self.queries
        return self._once(
            ("window_attention", window_size),
            lambda: window_scores(queries, self.pages, self.scale, window_size, self.terms),
        )

    def key_similarity(self) -> torch.Tensor:
        """[R, KV, max_tokens]: see `CacheRows.key_similarity`."""
        return self._once(("key_similarity",), lambda: key_similarity(self.pages))

    def key_redundancy(self, threshold: float) -> torch.Tensor:
        """[R, KV, max_tokens]: see `CacheRows.key_redundancy`."""
        return self._once(
            ("key_redundancy", threshold), lambda: key_redundancy(self.pages, threshold)
        )

    def lag_contrast(self, num_sinks: int, lag_size: int) -> torch.Tensor:
        """[R, KV, max_tokens]: see `CacheRows.lag_contrast`."""
        return self._once(
            ("lag_contrast", num_sinks, lag_size),
            lambda: lag_scores(self.pages, num_sinks, lag_size),
        )

    def _last(self, num_queries: int) -> torch.Tensor:
        assert self.queries is not None
        return self.queries[:, self.queries.shape[1] - num_queries :]

    def _once(self, name: tuple, measure: Callable[[], torch.Tensor]) -> torch.Tensor:
        if name not in self._done:
            self._done[name] = measure()
        return self._done[name]


class PagedRows(CacheRows):
    """One request of a batch.

    Parameters
    ----------
    batch : PagedBatch
        All requests.
    request : int
        Its number in the batch.
    """

    def __init__(self, batch: PagedBatch, request: int) -> None:
        self.batch, self.request = batch, request
        self.length, self.scale = batch.lengths[request], batch.scale
        self.terms = batch.terms
        queries = batch.queries
        self.queries = None if queries is None else queries[request].transpose(0, 1)
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    @property
    def num_kv_heads(self) -> int:
        return self.batch.pages.num_kv_heads

    @property
    def num_tokens(self) -> int:
        return self.length

    @property
    def device(self) -> torch.device:
        return self.batch.pages.keys.device

    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]
        if self._keys is None:
            self._keys = self.batch.pages.gather_keys(self.request, self.length)
        return self._keys

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        if self._values is None:
            self._values = self.batch.pages.gather_values(self.request, self.length)
        return self._values

    def attention(self, num_queries: int) -> torch.Tensor:
        return self.batch.attention(num_queries)[self.request, :, : self.length]

    def head_attention(self, num_queries: int) -> torch.Tensor:
        return self.batch.head_attention(num_queries)[self.request, :, : self.length]

    def attention_sums(self) -> torch.Tensor:
        return self.batch.attention_sums()[self.request, :, : self.length]

    def window_attention(self, window_size: int) -> torch.Tensor:
        assert self.queries is not None
        window = self.queries.shape[1]
        num_review = self.length - window
        if not takes_window_size(window_size):
            return window_means(self.attention(window)[:, :num_review], window_size)
        num_windows = -(-num_review // window_size)
        return self.batch.window_attention(window_size)[self.request, :, :num_windows]

    def key_similarity(self) -> torch.Tensor:
        return self.batch.key_similarity()[self.request, :, : self.length]

    def key_redundancy(self, threshold: float) -> torch.Tensor:
        return self.batch.key_redundancy(threshold)[self.request, :, : self.length]

    def lag_contrast(self, num_sinks: int, lag_size: int) -> torch.Tensor:
        return self.batch.lag_contrast(num_sinks, lag_size)[self.request, :, : self.length]

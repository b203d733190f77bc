"""One layer's cached tokens of one request, and what policies measure on them.

A policy asks for measurements and never for where the rows lie: on a GPU they are read in place,
from pages, by kernels that serve all requests of a step at once; on a CPU from gathered rows.
Dimensions: H query heads, KV key-value heads, w queries, n tokens, D head_dim.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from vllm_kvcompress.kernels.formulas import key_similarity, lag_contrast
from vllm_kvcompress.kernels.formulas.key_redundancy import dense_redundancy
from vllm_kvcompress.kernels.formulas.prompt_attention import dense_attention_sums
from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms
from vllm_kvcompress.kernels.formulas.window_attention import (
    window_attention_scores,
    window_head_scores,
)


class CacheRows(ABC):
    """Cached tokens of one request in one layer, in logical order.

    Attributes
    ----------
    keys, values : torch.Tensor
        [KV, n, D], keys after RoPE; from pages they are copied when first read.
    queries : torch.Tensor or None
        [H, w, D] after RoPE, of the last w tokens; None where nobody asked for queries.
    scale : float
        Softmax scale of the layer.
    terms : SoftmaxTerms
        Its soft cap and sinks, which whatever is called attention here knows.
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor | None
    scale: float
    terms: SoftmaxTerms = PLAIN

    @property
    @abstractmethod
    def num_kv_heads(self) -> int:
        """KV."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """n."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the rows are."""

    @abstractmethod
    def attention(self, num_queries: int) -> torch.Tensor:
        """[KV, n] float32: attention of the last `num_queries` queries, mean over them and heads.

        The mean is over the query heads of a KV head. (SnapKV, arXiv 2404.14469, before pooling)
        """

    @abstractmethod
    def head_attention(self, num_queries: int) -> torch.Tensor:
        """[H, n] float32: as `attention`, for every query head alone. (SpindleKV, 2507.06517)"""

    @abstractmethod
    def attention_sums(self) -> torch.Tensor:
        """[KV, n] float32: attention of all w queries, summed over them, mean over heads.

        For the many queries of a prompt's chunk; see `formulas.prompt_attention`. (H2O, 2306.14048)
        """

    @abstractmethod
    def window_attention(self, window_size: int) -> torch.Tensor:
        """[KV, ceil((n - w) / window_size)] float32: mean of `attention(w)` over windows.

        Windows are cut from token 0 and end before the last w tokens; the last one may be shorter.
        (WindowKV, arXiv 2503.17922)
        """

    @abstractmethod
    def key_similarity(self) -> torch.Tensor:
        """[KV, n] float32: cosine of each key with the mean unit key. (KeyDiff, 2504.15364)"""

    @abstractmethod
    def key_redundancy(self, threshold: float) -> torch.Tensor:
        """[KV, n] float32: see `formulas.key_redundancy`. (R-KV, 2505.24133)"""

    @abstractmethod
    def lag_contrast(self, num_sinks: int, lag_size: int) -> torch.Tensor:
        """[KV, n] float32: see `formulas.lag_contrast`. (LagKV, arXiv 2504.04704)"""


def window_means(scores: torch.Tensor, window_size: int) -> torch.Tensor:
    """[..., n] -> [..., ceil(n / window_size)]: means; a short last window uses what it has."""
    count = scores.shape[-1]
    padded = pad(scores, (0, -count % window_size))
    grid = padded.unflatten(-1, (padded.shape[-1] // window_size, window_size))
    means = grid.sum(dim=-1) / window_size
    if count % window_size:
        means[..., -1] *= window_size / (count % window_size)
    return means


@dataclass(frozen=True)
class DenseRows(CacheRows):
    """Rows that lie in plain tensors."""

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor | None
    scale: float
    terms: SoftmaxTerms = PLAIN

    @property
    def num_kv_heads(self) -> int:
        return self.keys.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def attention(self, num_queries: int) -> torch.Tensor:
        return window_attention_scores(self._last(num_queries), self.keys, self.scale, self.terms)

    def head_attention(self, num_queries: int) -> torch.Tensor:
        return window_head_scores(self._last(num_queries), self.keys, self.scale, self.terms)

    def _last(self, num_queries: int) -> torch.Tensor:
        assert self.queries is not None
        return self.queries[:, self.queries.shape[1] - num_queries :]

    def attention_sums(self) -> torch.Tensor:
        assert self.queries is not None
        return dense_attention_sums(self.queries, self.keys, self.scale, self.terms)

    def window_attention(self, window_size: int) -> torch.Tensor:
        assert self.queries is not None
        window = self.queries.shape[1]
        scores = self.attention(window)
        return window_means(scores[:, : scores.shape[1] - window], window_size)

    def key_similarity(self) -> torch.Tensor:
        return key_similarity.key_similarity(self.keys)

    def key_redundancy(self, threshold: float) -> torch.Tensor:
        return dense_redundancy(self.keys, threshold)

    def lag_contrast(self, num_sinks: int, lag_size: int) -> torch.Tensor:
        return lag_contrast.lag_contrast(self.keys, self.values, num_sinks, lag_size)

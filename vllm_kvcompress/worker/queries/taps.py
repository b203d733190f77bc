"""Lets several recorders see the queries of attention layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Protocol

import torch


class QueryRecorder(Protocol):
    """Something that keeps queries."""

    @property
    def is_active(self) -> bool:
        """Whether the current step has anything for it. Read while a CUDA graph is captured."""

    def record(self, layer_name: str, query: torch.Tensor) -> None:
        """Take what it wants of [num_tokens, num_heads, head_dim] queries, after RoPE.

        By then the keys and values of the same tokens are in the layer's cache.
        """


class QueryTaps:
    """Recorders of a model's attention layers, all of which see every layer.

    There is no hook between a layer and its kernel that also survives torch.compile, so
    implementation objects' `forward` is wrapped; compiled models reach it through a custom op.
    A full CUDA graph replays only tensor operations of recorders that were active while it was
    captured.

    Recorders are asked after the layer's attention: some backends write the cache before it, in an
    operation of its own, others within it (`AttentionBackend.forward_includes_kv_cache_update`).

    Parameters
    ----------
    recorders : sequence of QueryRecorder
        In the order they are asked.
    dtype : torch.dtype
        What the model computes in, and recorders are shown. Beside an 8-bit cache vLLM quantises
        the queries that some backends are handed (`AttentionImpl.supports_quant_query_input`).
    """

    def __init__(self, recorders: Sequence[QueryRecorder], dtype: torch.dtype) -> None:
        self.recorders, self.dtype = list(recorders), dtype
        self._is_muted = False

    def watch(self, layer_name: str, impl: Any) -> None:
        """Let the recorders see the queries of one attention layer."""
        forward: Callable[..., torch.Tensor] = impl.forward

        @wraps(forward)
        def watched(layer: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            output = forward(layer, query, *args, **kwargs)
            self._show(layer_name, layer, query)
            return output

        impl.forward = watched

    def watch_latent(self, layer_name: str, layer: Any) -> None:
        """Let the recorders see the queries of one layer of latent attention (MLA).

        Its implementation has no `forward`: the layer splits a batch into prefills and decodes
        and absorbs the queries of decodes alone. Before that they are alike.
        """
        forward: Callable[..., torch.Tensor] = layer.forward_impl

        @wraps(forward)
        def watched(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            output = forward(q, *args, **kwargs)
            self._show(layer_name, layer, q)
            return output

        layer.forward_impl = watched

    def _show(self, layer_name: str, layer: Any, query: torch.Tensor) -> None:
        if self._is_muted:
            return
        for recorder in self.recorders:
            if recorder.is_active:
                recorder.record(layer_name, self._unquantised(layer, query))

    def _unquantised(self, layer: Any, query: torch.Tensor) -> torch.Tensor:
        """Queries in the model's type; every 8-bit float is a bfloat16 and a float16."""
        if query.element_size() > 1:
            return query
        return query.to(self.dtype).mul_(layer._q_scale)

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Passes whose queries are nobody's: draft steps, run or captured, read other caches."""
        self._is_muted = True
        try:
            yield
        finally:
            self._is_muted = False

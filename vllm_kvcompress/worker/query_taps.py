"""Lets several recorders see the queries of attention layers."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol

import torch


class QueryRecorder(Protocol):
    """Something that keeps queries."""

    @property
    def is_active(self) -> bool:
        """Whether the current step has anything for it. Read while a CUDA graph is captured."""

    def record(self, layer_name: str, query: torch.Tensor) -> None:
        """Take what it wants of [num_tokens, num_heads, head_dim] queries, after RoPE."""


def watch_layer(layer_name: str, impl: Any, recorders: list[QueryRecorder]) -> None:
    """Let recorders see the queries of one attention layer.

    There is no hook between a layer and its kernel that also survives torch.compile, so the
    implementation object's `forward` is wrapped; compiled models reach it through a custom op.
    A full CUDA graph replays only tensor operations of recorders that were active while it was
    captured.
    """
    forward: Callable[..., torch.Tensor] = impl.forward

    @wraps(forward)
    def watched(layer: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        for recorder in recorders:
            if recorder.is_active:
                recorder.record(layer_name, query)
        return forward(layer, query, *args, **kwargs)

    impl.forward = watched

"""Stash of the last queries of prompts that are about to be compressed.

Prompts are computed in chunks and the last chunk may be shorter than the observation window, so
queries are collected over several steps. A request's stash lives from the step that computes the
first token of its window to its compaction, usually one step: nothing is reserved per row.
"""

from dataclasses import dataclass

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch


@dataclass
class _Stash:
    """Queries of one request: per layer [window, num_heads, head_dim]."""

    window_start: int
    window_end: int
    layers: dict[str, torch.Tensor]
    num_filled: dict[str, int]

    @property
    def window(self) -> int:
        return self.window_end - self.window_start


@dataclass(frozen=True)
class _Capture:
    """Tokens [start, end) of this step's queries go to `offset` of a stash."""

    stash: _Stash
    start: int
    end: int
    offset: int


class QueryWindow:
    """Collects queries from wrapped attention layers."""

    def __init__(self) -> None:
        self._stashes: dict[str, _Stash] = {}
        self._captures: list[_Capture] = []

    def add_request(self, request_id: str, prompt_len: int, window: int) -> None:
        """Expect the queries of positions [prompt_len - window, prompt_len)."""
        start = max(prompt_len - window, 0)
        self._stashes[request_id] = _Stash(start, prompt_len, {}, {})

    def remove_request(self, request_id: str) -> None:
        """Drop what was collected; unknown ids are fine."""
        self._stashes.pop(request_id, None)

    def wants(self, request_id: str, num_computed: int, num_new: int) -> bool:
        """Whether tokens [num_computed, num_computed + num_new) touch the request's window."""
        stash = self._stashes.get(request_id)
        return (
            stash is not None
            and num_computed < stash.window_end
            and num_computed + num_new > stash.window_start
        )

    def begin_batch(self, input_batch: InputBatch) -> None:
        """Find out which of the batch's tokens to keep the queries of."""
        self._captures = []
        if not self._stashes:
            return
        starts = input_batch.query_start_loc_np
        for row, request_id in enumerate(input_batch.req_ids):
            computed = int(input_batch.num_computed_tokens_np[row])
            num_new = int(input_batch.num_scheduled_tokens[row])
            if not self.wants(request_id, computed, num_new):
                continue
            stash = self._stashes[request_id]
            first = max(stash.window_start, computed)
            last = min(stash.window_end, computed + num_new)
            base = int(starts[row]) - computed
            self._captures.append(
                _Capture(stash, base + first, base + last, first - stash.window_start)
            )

    @property
    def is_active(self) -> bool:
        """Whether the current batch touches a window."""
        return bool(self._captures)

    def end_batch(self) -> None:
        """Stop collecting until the next batch."""
        self._captures = []

    def record(self, layer_name: str, query: torch.Tensor) -> None:
        """Keep what `begin_batch` asked for from [num_tokens, num_heads, head_dim] queries."""
        for capture in self._captures:
            stash = capture.stash
            buffer = stash.layers.get(layer_name)
            if buffer is None:
                buffer = query.new_empty(stash.window, *query.shape[1:])
                stash.layers[layer_name] = buffer
            count = capture.end - capture.start
            buffer[capture.offset : capture.offset + count] = query[capture.start : capture.end]
            stash.num_filled[layer_name] = stash.num_filled.get(layer_name, 0) + count

    def take(self, request_id: str, layer_name: str) -> torch.Tensor:
        """Return a layer's queries [num_heads, window, head_dim].

        Raises
        ------
        RuntimeError
            If some of the window was never seen, as when a CUDA graph replayed the attention
            layers without Python. The start-up checks and `wants` exist to make this impossible.
        """
        stash = self._stashes[request_id]
        filled = stash.num_filled.get(layer_name, 0)
        if filled != stash.window:
            raise RuntimeError(
                f"KV compression: layer {layer_name} saw {filled} of {stash.window} queries of "
                f"request {request_id}'s observation window; please report this. "
                "--enforce-eager avoids it."
            )
        return stash.layers[layer_name].transpose(0, 1)

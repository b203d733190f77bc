"""Stash of the last queries of prompts that are about to be compressed.

Prompts are computed in chunks and a chunk may be shorter than the observation window, so queries
are collected over several steps. A stash lives from the step that computes the first token of its
window to the compaction at its end, usually one step: nothing is reserved per row. Requests whose
windows begin in the same step share a buffer, so that one launch per layer fills it. A request that
is compacted inside its prompt, too, has a window before each of these compactions; windows do not
overlap.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_kvcompress.kernels.dispatch import backend_of
from vllm_kvcompress.kernels.host_copy import send_together

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch


@dataclass
class _Buffer:
    """Queries of some requests: per layer [num_rows, num_heads, head_dim]."""

    num_rows: int = 0
    layers: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class _Stash:
    """One window of a request's positions, and where its queries are once it has begun."""

    window_start: int
    window_end: int
    buffer: _Buffer | None = None
    first_row: int = 0
    num_filled: Counter[str] = field(default_factory=Counter)

    @property
    def window(self) -> int:
        return self.window_end - self.window_start


@dataclass
class _Capture:
    """What the current step writes to one buffer: a row per token or -1, and counts per stash."""

    rows: np.ndarray
    counts: list[tuple[_Stash, int]] = field(default_factory=list)
    slots: torch.Tensor | None = None


class QueryWindow:
    """Collects queries from wrapped attention layers.

    Parameters
    ----------
    device : torch.device
        Where the queries are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._store = backend_of(device).store_rows
        self._stashes: dict[str, list[_Stash]] = {}  # in the order of the prompt
        self._captures: list[tuple[_Buffer, _Capture]] = []

    def add_request(self, request_id: str, ends: Sequence[int], window: int) -> None:
        """Expect the queries of positions [end - window, end) of all `ends`, ascending."""
        self._stashes[request_id] = [_Stash(max(end - window, 0), end) for end in ends]

    def remove_request(self, request_id: str, end: int | None = None) -> None:
        """Drop what was collected, up to `end` if it is given; unknown ids are fine."""
        stashes = self._stashes.pop(request_id, [])
        left = [] if end is None else [each for each in stashes if each.window_end > end]
        if left:
            self._stashes[request_id] = left

    @property
    def awaits_requests(self) -> bool:
        """Whether queries of any request are expected."""
        return bool(self._stashes)

    def wants(self, request_id: str, num_computed: int, num_new: int) -> bool:
        """Whether tokens [num_computed, num_computed + num_new) touch the request's window."""
        return any(self._touched(request_id, num_computed, num_new))

    def _touched(self, request_id: str, num_computed: int, num_new: int) -> Iterator[_Stash]:
        for stash in self._stashes.get(request_id, ()):
            if num_computed < stash.window_end and num_computed + num_new > stash.window_start:
                yield stash

    def begin_batch(self, input_batch: "InputBatch") -> None:
        """Find out which of the batch's tokens to keep the queries of."""
        self._captures = []
        if not self._stashes:
            return
        starts = input_batch.query_start_loc_np
        captures: dict[int, tuple[_Buffer, _Capture]] = {}
        newcomers = _Buffer()
        for row, request_id in enumerate(input_batch.req_ids):
            computed = int(input_batch.num_computed_tokens_np[row])
            num_new = int(input_batch.num_scheduled_tokens[row])
            for stash in self._touched(request_id, computed, num_new):
                if stash.buffer is None:
                    stash.buffer, stash.first_row = newcomers, newcomers.num_rows
                    newcomers.num_rows += stash.window
                buffer = stash.buffer
                if id(buffer) not in captures:
                    rows = np.full(int(starts[len(input_batch.req_ids)]), -1, dtype=np.int64)
                    captures[id(buffer)] = buffer, _Capture(rows)
                capture = captures[id(buffer)][1]
                first = max(stash.window_start, computed)
                count = min(stash.window_end, computed + num_new) - first
                token = int(starts[row]) + first - computed
                place = stash.first_row + first - stash.window_start
                capture.rows[token : token + count] = np.arange(place, place + count)
                capture.counts.append((stash, count))
        self._captures = list(captures.values())
        sent = send_together([capture.rows for _, capture in self._captures], self.device)
        for (_, capture), slots in zip(self._captures, sent, strict=True):
            capture.slots = slots

    @property
    def is_active(self) -> bool:
        """Whether the current batch touches a window."""
        return bool(self._captures)

    def end_batch(self) -> None:
        """Stop collecting until the next batch."""
        self._captures = []

    def record(self, layer_name: str, query: torch.Tensor) -> None:
        """Keep what `begin_batch` asked for from [num_tokens, num_heads, head_dim] queries."""
        for buffer, capture in self._captures:
            kept = buffer.layers.get(layer_name)
            if kept is None:
                kept = query.new_empty(buffer.num_rows, *query.shape[1:])
                buffer.layers[layer_name] = kept
            self._store(query[: len(capture.rows)], capture.slots, kept)
            for stash, count in capture.counts:
                stash.num_filled[layer_name] += count

    def warm_up(self, query: torch.Tensor) -> None:
        """Launch for [num_tokens, num_heads, head_dim] queries of which none is kept."""
        slots = torch.full((len(query),), -1, dtype=torch.int64, device=self.device)
        self._store(query, slots, torch.empty_like(query))

    def take(self, request_id: str, layer_name: str, end: int) -> torch.Tensor:
        """Return a layer's queries [num_heads, window, head_dim] of the window that ends at `end`.

        Raises
        ------
        RuntimeError
            If some of the window was never seen, as when a CUDA graph replayed the attention
            layers without Python. The start-up checks and `wants` exist to make this impossible.
        """
        stash = next(each for each in self._stashes[request_id] if each.window_end == end)
        filled = stash.num_filled[layer_name]
        if stash.buffer is None or filled != stash.window:
            raise RuntimeError(
                f"KV compression: layer {layer_name} saw {filled} of {stash.window} queries of "
                f"request {request_id}'s observation window; please report this. "
                "--enforce-eager avoids it."
            )
        rows = stash.buffer.layers[layer_name][stash.first_row : stash.first_row + stash.window]
        return rows.transpose(0, 1)

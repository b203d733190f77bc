"""Ring of recent queries of requests that are about to be compacted while decoding.

The scheduler hands out slots of the ring (core/query_slots.py). What a step records is one launch
on persistent buffers, so it is captured into full CUDA graphs and replayed with them; only the
places are computed outside.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_kvcompress.kernels.dispatch import backend_of
from vllm_kvcompress.kernels.host_copy import overwrite
from vllm_kvcompress.lengths.decode_queries import RingShape

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch


class QueryRing:
    """Last queries per slot and layer; nothing at all without slots.

    Parameters
    ----------
    shape : RingShape
        Slots, and queries of each.
    max_num_reqs, max_num_tokens : int
        Request rows, and tokens per step.
    device : torch.device
        Where the queries are.
    """

    def __init__(
        self, shape: RingShape, max_num_reqs: int, max_num_tokens: int, device: torch.device
    ) -> None:
        self.shape = shape
        self._slot_of_row = np.full(max_num_reqs, -1, dtype=np.int32)
        self._slot_of_row_gpu = torch.full((max_num_reqs,), -1, dtype=torch.int32, device=device)
        self._recorded: set[int] = set()  # rows that have a slot
        self._is_dirty = False
        self._places = torch.full((max_num_tokens,), -1, device=device)
        self._is_recording = False
        self._find_places = backend_of(device).ring_slots
        self._store = backend_of(device).store_rows
        self._layers: dict[str, torch.Tensor] = {}

    @property
    def is_active(self) -> bool:
        """Always, if there is a ring: a captured graph must contain it."""
        return bool(self._layers)

    @property
    def num_bytes(self) -> int:
        """Memory of the ring on this rank."""
        return sum(each.numel() * each.element_size() for each in self._layers.values())

    def __str__(self) -> str:
        """For the log."""
        from vllm.utils.mem_utils import format_gib

        shape, size = self.shape, format_gib(self.num_bytes)
        return f"ring of {shape.num_slots} slots of {shape.slot_len} queries, {size} GiB"

    def add_layer(self, name: str, num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Reserve a layer's buffer; before the server measures how much memory is left."""
        if self.shape.num_slots:
            self._layers[name] = torch.zeros(
                self.shape.num_slots * self.shape.slot_len, num_heads, head_dim,
                dtype=dtype, device=self._places.device,
            )  # fmt: skip

    def assign(self, req_index: int, slot: int) -> None:
        """Record a row's queries in a slot from the next batch on; -1: in none."""
        if self._slot_of_row[req_index] != slot:
            self._slot_of_row[req_index] = slot
            if slot < 0:
                self._recorded.discard(req_index)
            else:
                self._recorded.add(req_index)
            self._is_dirty = True

    def begin_batch(self, input_batch: "InputBatch") -> None:
        """Find the places of a real batch's tokens."""
        if self._is_dirty:
            overwrite(self._slot_of_row_gpu, self._slot_of_row)
            self._is_dirty = False
        if not self._layers or not self._recorded:
            return
        if (self._slot_of_row[input_batch.idx_mapping_np] >= 0).any():
            self._find_places(
                positions=input_batch.positions[: input_batch.num_tokens],
                query_start_loc=input_batch.query_start_loc,
                seq_lens=input_batch.seq_lens,
                idx_mapping=input_batch.idx_mapping,
                slots=self._slot_of_row_gpu,
                size=self.shape.slot_len,
                out=self._places,
            )
            self._is_recording = True

    def end_batch(self) -> None:
        """A batch that records nothing, or a dummy one, writes nothing."""
        if self._is_recording:
            self._places.fill_(-1)
            self._is_recording = False

    def record(self, layer_name: str, query: torch.Tensor) -> None:
        """Write [num_tokens, num_heads, head_dim] queries to their places."""
        self._store(query, self._places, self._layers[layer_name])

    def take(self, req_index: int, layer_name: str, position: int, window: int) -> torch.Tensor:
        """Queries [num_heads, window, head_dim] of positions [position - window, position).

        Raises
        ------
        RuntimeError
            If the row has no slot; the scheduler plans no compaction without one.
        """
        assert 0 < window <= self.shape.window, (window, self.shape.window)
        slot = int(self._slot_of_row[req_index])
        if slot < 0:
            raise RuntimeError(
                f"KV compression: request row {req_index} is compacted at {position} tokens and "
                "its queries were not recorded; please report this."
            )
        size = self.shape.slot_len
        positions = torch.arange(position - window, position, device=self._places.device)
        return self._layers[layer_name][slot * size + positions % size].transpose(0, 1)

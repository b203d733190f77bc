"""Ring of the last queries of every request row, for compactions while decoding.

Everything a step does to the ring is one launch on persistent buffers, so it is captured into full
CUDA graphs and replayed with them; only the slots are computed outside.
"""

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_kvcompress.kernels.dispatch import for_device


class QueryRing:
    """Last `window` queries per request row and layer; nothing at all if `window` is 0.

    Parameters
    ----------
    window : int
        Queries that a compaction may ask for.
    num_spec_tokens : int
        Draft tokens per step. The ring is larger by those of two steps: drafts that come to
        nothing must not overwrite queries of the window.
    max_num_reqs, max_num_tokens : int
        Request rows, and tokens per step.
    device : torch.device
        Where the queries are.
    """

    def __init__(
        self,
        window: int,
        num_spec_tokens: int,
        max_num_reqs: int,
        max_num_tokens: int,
        device: torch.device,
    ) -> None:
        self.window = window
        drafts = 2 * (num_spec_tokens + 1) if num_spec_tokens else 0
        self.size = window + drafts if window else 0
        self._num_slots = max_num_reqs * self.size
        self._slots = torch.full((max_num_tokens,), -1, device=device)
        self._find_slots = for_device("step_slots", device).ring_slots
        self._store = for_device("store_rows", device).store_rows
        self._layers: dict[str, torch.Tensor] = {}

    @property
    def is_active(self) -> bool:
        """Always, if there is a ring: a captured graph must contain it."""
        return bool(self._layers)

    @property
    def num_bytes(self) -> int:
        """Memory of the ring on this rank."""
        return sum(each.numel() * each.element_size() for each in self._layers.values())

    def add_layer(self, name: str, num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Reserve a layer's buffer; before the server measures how much memory is left."""
        if self.size:
            self._layers[name] = torch.zeros(
                self._num_slots, num_heads, head_dim, dtype=dtype, device=self._slots.device
            )

    def begin_batch(self, input_batch: InputBatch) -> None:
        """Find the slots of a real batch's tokens."""
        if self._layers:
            self._find_slots(
                positions=input_batch.positions[: input_batch.num_tokens],
                query_start_loc=input_batch.query_start_loc,
                seq_lens=input_batch.seq_lens,
                idx_mapping=input_batch.idx_mapping,
                size=self.size,
                out=self._slots,
            )

    def end_batch(self) -> None:
        """A dummy batch that follows writes nothing."""
        if self._layers:
            self._slots.fill_(-1)

    def record(self, layer_name: str, query: torch.Tensor) -> None:
        """Write [num_tokens, num_heads, head_dim] queries to their slots."""
        self._store(query, self._slots, self._layers[layer_name])

    def take(self, req_index: int, layer_name: str, position: int, window: int) -> torch.Tensor:
        """Queries [num_heads, window, head_dim] of positions [position - window, position)."""
        assert 0 < window <= self.window, (window, self.window)
        positions = torch.arange(position - window, position, device=self._slots.device)
        slots = req_index * self.size + positions % self.size
        return self._layers[layer_name][slots].transpose(0, 1)

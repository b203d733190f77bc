"""How many slots each request row has given up in each KV cache group, and lengths from that."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_kvcompress.kernels.dispatch import backend_of
from vllm_kvcompress.kernels.host_copy import to_device
from vllm_kvcompress.worker.host_mirror import HostMirror

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch


class EvictedLengths:
    """Evicted slots per KV cache group and request row, and the lengths that follow from them.

    Parameters
    ----------
    num_groups : int
        KV cache groups.
    max_num_reqs : int
        Request rows of the model runner.
    device : torch.device
        Where the attention metadata lives.

    Attributes
    ----------
    evicted : HostMirror
        [num_groups, max_num_reqs] int32; `.np` on the host, `.gpu` on the device.
    seq_lens : torch.Tensor
        [num_groups, max_num_reqs] int32, persistent: full CUDA graphs replay its addresses.
    """

    def __init__(self, num_groups: int, max_num_reqs: int, device: torch.device) -> None:
        self.evicted = HostMirror((num_groups, max_num_reqs), device)
        self.seq_lens = torch.zeros(num_groups, max_num_reqs, dtype=torch.int32, device=device)
        self._physical_seq_lens = backend_of(device).physical_seq_lens
        self._dirty = False
        self._compacted: set[int] = set()  # rows that have given up a slot
        self._batch: InputBatch | None = None
        self._nothing = np.zeros((num_groups, max_num_reqs), dtype=np.int32)
        self._lost = self._nothing[:, :0]  # [G, requests] of the batch
        self._is_whole = True
        self._is_filled = False
        self._hidden: dict[int, np.ndarray] = {}

    def reset_row(self, req_index: int) -> None:
        """A row starts over: nothing is evicted."""
        if req_index in self._compacted:
            self._compacted.discard(req_index)
            self.evicted.np[:, req_index] = 0
            self._dirty = True

    def add_evicted(self, group: int, req_index: int, num_slots: int) -> None:
        """Count slots that a row has given up in one group."""
        if num_slots:
            self.evicted.np[group, req_index] += num_slots
            self._compacted.add(req_index)
            self._dirty = True

    def send(self) -> None:
        """Let kernels read what was given up since the batch began; drafts follow a compaction."""
        if self._dirty:
            self.evicted.send()
            self._dirty = False

    def begin_batch(self, input_batch: "InputBatch") -> bool:
        """Look at a real batch. True if any of its requests is compacted: `seq_lens` is filled.

        Else `group_seq_lens` fills it, if anybody asks.
        """
        self.send()
        self._batch, self._is_whole, self._is_filled = input_batch, True, False
        if self._hidden:
            self._hidden = {}
        if not self._compacted:
            self._lost = self._nothing[:, : len(input_batch.idx_mapping_np)]
        else:
            self._lost = self.evicted.np[:, input_batch.idx_mapping_np]
            self._is_whole = not self._lost.any()
            if not self._is_whole:
                self._fill(input_batch)
        return not self._is_whole

    def _fill(self, input_batch: "InputBatch") -> None:
        self._physical_seq_lens(
            input_batch.seq_lens, input_batch.idx_mapping, self.evicted.gpu, self.seq_lens
        )
        self._is_filled = True

    def hide(self, group: int, batch_rows: np.ndarray) -> None:
        """Let rows of the current batch look as if they held nothing but their query tokens.

        What vLLM's attention makes of them is replaced: it cannot read how their blocks begin.
        """
        assert self._batch is not None
        if not self._is_filled:
            self._fill(self._batch)
        counts = self._batch.query_start_loc.diff()
        rows = to_device(batch_rows, torch.int64, counts.device)
        self.seq_lens[group, rows] = counts[rows]
        self._hidden[group] = batch_rows

    def is_current(self, input_batch: "InputBatch") -> bool:
        """Whether `begin_batch` has seen this batch; dummy batches never go through it."""
        return self._batch is input_batch

    def is_whole(self, input_batch: "InputBatch") -> bool:
        """Whether this is the current batch and none of its requests has lost anything."""
        return self._batch is input_batch and self._is_whole

    def group_seq_lens(self, input_batch: "InputBatch") -> torch.Tensor:
        """Lengths [num_groups, >= padded rows] of a batch; a dummy batch has lost nothing."""
        if not self.is_current(input_batch):
            self.seq_lens[:, : input_batch.seq_lens.shape[0]] = input_batch.seq_lens
        elif not self._is_filled:
            self._fill(input_batch)
        return self.seq_lens

    def group_upper_bound(self, input_batch: "InputBatch", group: int) -> torch.Tensor:
        """`input_batch.seq_lens_cpu_upper_bound` [rows], less what `group` has evicted.

        A dummy batch has lost nothing, nor has a batch of which no request is compacted: theirs is
        given back as it is.
        """
        bound = input_batch.seq_lens_cpu_upper_bound
        if not self.is_current(input_batch) or (self._is_whole and group not in self._hidden):
            return bound
        own = bound.numpy().copy()
        own[: self._lost.shape[1]] -= self._lost[group]
        if group in self._hidden:
            rows = self._hidden[group]
            own[rows] = np.diff(input_batch.query_start_loc_np)[rows]
        return torch.from_numpy(own)

    def have_lost(self, input_batch: "InputBatch") -> np.ndarray:
        """[requests] bool: which requests of a batch have lost tokens in some group."""
        if not self.is_current(input_batch) or self._is_whole:
            return np.zeros(len(input_batch.idx_mapping_np), dtype=bool)
        return np.asarray(self._lost.any(axis=0))

    def max_seq_lens(self, input_batch: "InputBatch", num_rows: int) -> list[int]:
        """Per group the largest of `group_upper_bound`'s first `num_rows`."""
        bound = input_batch.seq_lens_cpu_upper_bound.numpy()[:num_rows]
        if not self.is_current(input_batch) or (self._is_whole and not self._hidden):
            return [int(bound.max())] * len(self.seq_lens)
        num_real = self._lost.shape[1]
        largest = (bound[:num_real] - self._lost).max(axis=1)
        if num_real < num_rows:
            largest = np.maximum(largest, bound[num_real:].max())
        lengths = list(memoryview(largest))  # of ints, as numpy's own are slower
        for group in self._hidden:
            lengths[group] = int(self.group_upper_bound(input_batch, group)[:num_rows].max())
        return lengths

"""Compressed views of requests' caches: what draft steps read in the place of all blocks.

A view is a block table row of its own. Its first blocks hold survivors of a region of the prompt:
private blocks that a compaction filled, or some of the request's own. Behind them come the
request's blocks from the region's end on, shared with the target, where drafts write their keys
and the verification overwrites them.

    column c of the view  =  view block c                       c < kept[group, row]
                             own block c + dropped[group, row]  otherwise
    index in the view     =  index in the cache - dropped[group, row] * block size

Dimensions: G KV cache groups, S request rows, d rows that draft, P columns.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vllm_kvcompress.kernels.host_copy import overwrite, send_together
from vllm_kvcompress.plans import GroupPlan


class DraftViews:
    """Views of all request rows.

    Parameters
    ----------
    block_tables : sequence of torch.Tensor
        G tensors [S, P] int32: the target's own tables, read anew in every step.
    block_sizes : sequence of int
        Tokens per block of each group.
    """

    def __init__(self, block_tables: Sequence[torch.Tensor], block_sizes: Sequence[int]) -> None:
        self.block_tables, self.block_sizes = list(block_tables), list(block_sizes)
        num_groups, num_rows = len(self.block_tables), self.block_tables[0].shape[0]
        self.blocks = [torch.zeros_like(table) for table in self.block_tables]
        device = self.block_tables[0].device
        # Blocks that lead a row's view, and blocks of its own that it leaves out, in one copy.
        self._counts_np = np.zeros((2, num_groups, num_rows), dtype=np.int32)
        self._kept_np, self._dropped_np = self._counts_np
        self._counts = torch.zeros(2, num_groups, num_rows, dtype=torch.int32, device=device)
        self._kept, self._dropped = self._counts
        self.exists = np.zeros(num_rows, dtype=bool)
        self._dirty = False

    def add(
        self,
        req_index: int,
        groups: Sequence[GroupPlan | None],
        evicted_with_it: Sequence[int] | None = None,
        linked: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        """Give a row the view that a plan has filled; a group without a plan is read whole.

        `evicted_with_it` are the tokens that each group's own row loses of the same region in the
        same step: the view's tail begins that much earlier in it. `linked` has the blocks [kept
        blocks] int32 of groups whose views are made of the request's own.
        """
        linked = linked or {}
        own = [plan.destination_blocks if plan is not None else () for plan in groups]
        sent = send_together([np.array(ids, dtype=np.int32) for ids in own], self._counts.device)
        for group, plan in enumerate(groups):
            ids = linked.get(group, sent[group])
            evicted = plan.lengths.evicted if plan is not None else 0
            if plan is not None and evicted_with_it is not None:
                evicted -= evicted_with_it[group]
            self.blocks[group][req_index, : len(ids)] = ids
            self._kept_np[group, req_index] = len(ids)
            self._dropped_np[group, req_index] = evicted // self.block_sizes[group]
        self.exists[req_index] = True
        self._dirty = True

    def reset_row(self, req_index: int) -> None:
        """A row starts over, or its request is gone: it has no view."""
        self.exists[req_index] = False

    def begin(self) -> None:
        """Send what `add` changed to the device, before the step's first `table`."""
        if self._dirty:
            overwrite(self._counts, self._counts_np)
            self._dirty = False

    def table(self, group: int, rows: torch.Tensor) -> torch.Tensor:
        """Block table [d, P] int32 of the views of [d] int64 request rows."""
        own = self.block_tables[group][rows]
        columns = torch.arange(own.shape[1], device=own.device)
        kept = self._kept[group][rows][:, None]
        source = columns + self._dropped[group][rows][:, None]
        tail = own.gather(1, source.clamp(max=own.shape[1] - 1).long())
        return torch.where(columns < kept, self.blocks[group][rows], tail)

    def num_dropped(self, group: int, rows: torch.Tensor) -> torch.Tensor:
        """[d] int32: tokens of the cache that views of these rows leave out."""
        return self._dropped[group][rows] * self.block_sizes[group]

    def num_dropped_np(self, group: int, rows: np.ndarray) -> np.ndarray:
        """`num_dropped` on the host."""
        return self._dropped_np[group, rows] * self.block_sizes[group]

"""The block tables of all KV cache groups, as a kernel reaches them in one launch.

Dimensions: G KV cache groups, S request rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockTables:
    """Block tables and where they lie, made once: tables are persistent, their contents change.

    Attributes
    ----------
    tensors : tuple of torch.Tensor
        G tensors [S, blocks per row] int32, contiguous; held, so that the addresses stay valid.
    pointers : torch.Tensor
        [G] int64 on the device, addresses of the tensors.
    strides : torch.Tensor
        [G] int64 on the device, blocks per row of each.
    block_sizes : torch.Tensor
        [G] int32 on the device, tokens per block.
    """

    tensors: tuple[torch.Tensor, ...]
    pointers: torch.Tensor
    strides: torch.Tensor
    block_sizes: torch.Tensor

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], block_sizes: Sequence[int]) -> "BlockTables":
        """Look up the addresses of G tensors [S, blocks per row]; S is the same for all.

        Raises
        ------
        ValueError
            If there is no table, a table is no contiguous int32 matrix, or the numbers of tables
            and block sizes differ.
        """
        if not tensors or len(tensors) != len(block_sizes):
            raise ValueError(f"{len(tensors)} block tables, but {len(block_sizes)} block sizes")
        for table in tensors:
            if table.dtype != torch.int32 or table.ndim != 2 or not table.is_contiguous():
                raise ValueError(
                    "a block table must be a contiguous int32 matrix, "
                    f"got {table.dtype} {tuple(table.shape)}, strides {table.stride()}"
                )
        device = tensors[0].device
        addresses = [table.data_ptr() for table in tensors]
        widths = [table.shape[1] for table in tensors]
        return cls(
            tensors=tuple(tensors),
            pointers=torch.tensor(addresses, dtype=torch.int64, device=device),
            strides=torch.tensor(widths, dtype=torch.int64, device=device),
            block_sizes=torch.tensor(list(block_sizes), dtype=torch.int32, device=device),
        )

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.tensors)

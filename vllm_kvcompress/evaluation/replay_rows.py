"""Where a replay's compactor finds rows and puts survivors: in the place of a paged cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_kvcompress.kernels.codebook.coded_tokens import CodedTokens
from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.plans import BookLengths
from vllm_kvcompress.worker.batch import GroupBatch
from vllm_kvcompress.worker.codebook.slots import BookSlots
from vllm_kvcompress.worker.layout.base import CacheLayout
from vllm_kvcompress.worker.layout.layer_cache import LayerCache


@dataclass(frozen=True)
class KeptRows:
    """What a layer keeps of a prompt.

    Attributes
    ----------
    keys, values : torch.Tensor
        [KV, kept, D]: those of the region in the order in which they are written, then what lies
        behind it.
    positions : torch.Tensor
        [KV, kept] int64, their positions in the prompt.
    num_entries : torch.Tensor or None
        [2, KV] int64: entries of the keys' and of the values' book; None without a book.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    num_entries: torch.Tensor | None = None


class RowsOfPrompt(CacheLayout):
    """One layer's rows of the current prompt, in logical order; blocks do not matter."""

    def __init__(self, prefilled: Any, layer: int) -> None:
        super().__init__()
        self.prefilled, self.layer = prefilled, layer
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self.positions: torch.Tensor | None = None
        self.num_entries: torch.Tensor | None = None

    def move(
        self,
        caches: Sequence[torch.Tensor],
        group: GroupBatch,
        indices: torch.Tensor,
        rotary: Rotary | None,
    ) -> None:
        """Remember which tokens survive, too."""
        self.positions = indices[0, 0]
        super().move(caches, group, indices, rotary)

    def kept_rows(self, rows: KeptRows, region: int | None) -> KeptRows:
        """What stays of the prompt's rows after a compaction of `region` tokens; None: of none."""
        if region is None:
            return replace(rows, num_entries=self.num_entries)
        assert self.kept is not None and self.positions is not None
        before = (rows.keys, rows.values)
        keys, values = (
            torch.cat([kept, row[:, region:]], dim=1)
            for kept, row in zip(self.kept, before, strict=True)
        )
        chosen = rows.positions.gather(1, self.positions)
        positions = torch.cat([chosen, rows.positions[:, region:]], dim=1)
        return KeptRows(keys, values, positions, self.num_entries)

    def read(self, cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.prefilled.keys[self.layer], self.prefilled.values[self.layer]

    def write(
        self, cache: torch.Tensor, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        self.kept = keys, values

    def pages(self, *args: Any) -> Any:
        raise NotImplementedError("there are no blocks")


class RememberedCodes(BookSlots):
    """Remembers what codes and entries are read as, codes as rounded as slots hold them."""

    def store(
        self, layer: LayerCache, blocks: torch.Tensor, coded: CodedTokens, book: BookLengths
    ) -> None:
        layout: Any = layer.layout
        keys = layout.prefilled.keys[layout.layer]
        rows = coded.pack(book.num_code_rows, keys.shape[-1] * keys.element_size())
        entries = coded.keys.entries.to(keys.dtype), coded.values.entries.to(keys.dtype)
        stored = CodedTokens.unpack(entries, coded.num_entries, rows, book.num_tokens)
        layout.kept = stored.read(layout.prefilled.rotary)
        layout.num_entries, layout.positions = coded.num_entries, coded.positions

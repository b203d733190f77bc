"""Which version of a kernel a device runs: Triton on a GPU, torch on a CPU.

Triton's interpreter would run the same kernels on a CPU, a thousand times slower. Tests of the
GPU path ask for that.
"""

from typing import Protocol

import torch

from vllm_kvcompress.kernels.cache.block_tables import BlockTables
from vllm_kvcompress.kernels.codebook.book import Codebook
from vllm_kvcompress.kernels.codebook.pages import CodebookPages, TailPages
from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms


class Backend(Protocol):
    """What exists in two versions: the modules `triton_backend` and `torch_backend`.

    Arguments are described where the kernels are, in the module that each method names.
    """

    def store_rows(self, rows: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
        """Copy a step's rows to their slots: `cache.store_rows`."""

    def physical_seq_lens(
        self,
        seq_lens: torch.Tensor,
        idx_mapping: torch.Tensor,
        evicted: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Write each group's sequence lengths: `cache.step_slots`."""

    def physical_slots(
        self,
        positions: torch.Tensor,
        query_start_loc: torch.Tensor,
        idx_mapping: torch.Tensor,
        evicted: torch.Tensor,
        tables: BlockTables,
        out: torch.Tensor,
    ) -> None:
        """Write the slot of every token of a step: `cache.step_slots`."""

    def ring_slots(
        self,
        positions: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        idx_mapping: torch.Tensor,
        slots: torch.Tensor,
        size: int,
        out: torch.Tensor,
    ) -> None:
        """Write the place in the ring of every token of a step: `cache.step_slots`."""

    def select_tokens(
        self,
        scores: torch.Tensor,
        forced: torch.Tensor,
        num_tokens: torch.Tensor,
        num_keep: torch.Tensor,
        max_keep: int,
    ) -> torch.Tensor:
        """Pick each request's tokens to keep: `compaction.select_tokens`."""

    def build_codebook(
        self, vectors: torch.Tensor, num_vectors: torch.Tensor, threshold: float, max_entries: int
    ) -> Codebook:
        """Cover vectors by few of them: `codebook.build`."""

    def codebook_attention(
        self,
        queries: torch.Tensor,
        book: CodebookPages,
        inv_freq: torch.Tensor,
        is_neox: bool,
        scale: float,
        tail: TailPages | None = None,
        terms: SoftmaxTerms = PLAIN,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend to tokens that are stored as codes: `codebook.attention`."""


_interprets = False


def backend_of(device: torch.device) -> Backend:
    """What runs where some tensors are. Triton is imported only if it runs there."""
    if device.type == "cpu" and not _interprets:
        from vllm_kvcompress.kernels import torch_backend

        return torch_backend
    from vllm_kvcompress.kernels import triton_backend

    return triton_backend


def interpret_on_cpu(enabled: bool) -> None:
    """Let a CPU run the Triton kernels too, in Triton's interpreter; for the whole process.

    What asked `backend_of` before keeps what it was given.
    """
    global _interprets
    _interprets = enabled

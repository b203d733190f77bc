"""Attention backends that give a CPU engine the cache of a GPU.

They are vLLM's Triton backend, with its metadata, its cache of [blocks, KV heads, slots, K||V] and
its name. `StridedBackend` computes attention in torch: the interpreter needs seconds for a prompt.
"""

from typing import Any

import torch
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

from lab.gpu_path.paged_attention import paged_attention, write_cache


class InterpretedImpl(TritonAttentionImpl):
    """vLLM's own attention kernel. Cache writes in torch: its launcher for them asks CUDA."""

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Put keys and values [T, num_kv_heads, head_size] into their slots."""
        write_cache(key, value, kv_cache, slot_mapping)


class InterpretedBackend(TritonAttentionBackend):
    """vLLM's Triton attention through the interpreter."""

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        """See above."""
        return InterpretedImpl


class StridedImpl(InterpretedImpl):
    """Attention in torch too."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Fill `output` [T, num_heads, head_size]; in a profiling run with zeros."""
        assert output_scale is None and output_block_scale is None
        if attn_metadata is None:
            return output.fill_(0)
        paged_attention(
            query,
            kv_cache,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            self.scale,
            output,
        )
        return output


class StridedBackend(InterpretedBackend):
    """One block of the kernel per block of the table."""

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        """See above."""
        return StridedImpl


class SmallBlocksBackend(StridedBackend):
    """Blocks of 16 for the kernel, whatever the table has: vLLM may cut blocks on a GPU too."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """One size."""
        return [16]

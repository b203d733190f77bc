"""The Triton kernels that a CPU has torch versions of: what a GPU runs."""

from vllm_kvcompress.kernels.cache.step_slots import physical_seq_lens, physical_slots, ring_slots
from vllm_kvcompress.kernels.cache.store_rows import store_rows
from vllm_kvcompress.kernels.codebook.attention import codebook_attention
from vllm_kvcompress.kernels.codebook.build import build_codebook
from vllm_kvcompress.kernels.compaction.select_tokens import select_tokens

__all__ = [
    "build_codebook",
    "codebook_attention",
    "physical_seq_lens",
    "physical_slots",
    "ring_slots",
    "select_tokens",
    "store_rows",
]

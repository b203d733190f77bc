"""What a CPU runs in the place of Triton kernels: the same names, signatures and answers."""

from vllm_kvcompress.kernels.torch_backend.cache import (
    physical_seq_lens,
    physical_slots,
    ring_slots,
    store_rows,
)
from vllm_kvcompress.kernels.torch_backend.codebook_cover import build_codebook
from vllm_kvcompress.kernels.torch_backend.codebook_reads import codebook_attention
from vllm_kvcompress.kernels.torch_backend.compaction import select_tokens

__all__ = [
    "build_codebook",
    "codebook_attention",
    "physical_seq_lens",
    "physical_slots",
    "ring_slots",
    "select_tokens",
    "store_rows",
]

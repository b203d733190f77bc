"""Rotary embeddings in torch in the place of vLLM's kernel for CPUs.

The kernel takes queries of two dimensions with whole heads. It misreads others without a word, so
that tokens depend on what lies in memory: LFM2's have three dimensions, those of latent attention
without YaRN (GLM-4.7-Flash) are parts of heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch


@contextmanager
def rotary_in_torch() -> Iterator[None]:
    """Engines opened inside, in this process, turn queries and keys right on a CPU."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    with patch.object(RotaryEmbedding, "forward_cpu", RotaryEmbedding.forward_native):
        yield

"""A book of directions that stands for many vectors: what `build` makes, and of what.

Dimensions: P problems, n vectors, D their length, E max_entries.
"""

from dataclasses import dataclass

import torch

SHORTEST = 1e-18
"""Vectors that are shorter count as zero: in float32 their square is not worth dividing by."""


@dataclass(frozen=True)
class Codebook:
    """Entries of P independent problems and what each vector has become.

    Attributes
    ----------
    entries : torch.Tensor
        [P, E] int32, places of the chosen vectors in order of choice, then -1.
    num_entries : torch.Tensor
        [P] int32.
    index : torch.Tensor
        [P, n] int32, number of each vector's entry; -1 behind a problem's vectors.
    magnitude : torch.Tensor
        [P, n] float32, length of each vector; 0 behind them.
    cosine : torch.Tensor
        [P, n] float32 to the entry, at most 1, which it is for entries and zero vectors; 0 behind.
    num_forced : torch.Tensor
        [P] int32, vectors that were given an entry they are not adjacent to.
    """

    entries: torch.Tensor
    num_entries: torch.Tensor
    index: torch.Tensor
    magnitude: torch.Tensor
    cosine: torch.Tensor
    num_forced: torch.Tensor


def check_vectors(vectors: torch.Tensor, num_vectors: torch.Tensor, max_entries: int) -> None:
    """Refuse with a ValueError what `build_codebook` does not take."""
    if vectors.ndim != 3 or num_vectors.shape != vectors.shape[:1]:
        raise ValueError(
            f"num_vectors {tuple(num_vectors.shape)} does not fit vectors {tuple(vectors.shape)}"
        )
    if vectors.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"vectors must be float32, float16 or bfloat16, got {vectors.dtype}")
    if vectors.stride(2) != 1:
        raise ValueError("elements of a vector must be neighbours in memory")
    if max_entries < 1:
        raise ValueError(f"max_entries must be at least 1, got {max_entries}")

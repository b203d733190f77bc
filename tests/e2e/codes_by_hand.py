"""What a request's blocks stand for, read from the cache's bytes with NumPy alone.

Entries first, then codes, as ``kernels/codebook/packing.py`` describes them: six runs of T int16
per slot.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vllm_kvcompress.plans import BookLengths


@dataclass(frozen=True)
class Vectors:
    """Keys before RoPE, or values, of coded tokens: an entry times a length each.

    Attributes
    ----------
    entries : np.ndarray
        [KV, E, D] slots for entries.
    index : np.ndarray
        [KV, n] number of each token's entry.
    length : np.ndarray
        [KV, n].
    """

    entries: np.ndarray
    index: np.ndarray
    length: np.ndarray

    def read(self) -> np.ndarray:
        """[KV, n, D] float64."""
        found = np.take_along_axis(self.entries, self.index[..., None], axis=1)
        return found * self.length[..., None]


@dataclass(frozen=True)
class Coded:
    """One layer's codebook.

    Attributes
    ----------
    positions : np.ndarray
        [KV, n] places in the sequence.
    keys, values : Vectors
        The tokens.
    """

    positions: np.ndarray
    keys: Vectors
    values: Vectors


def decode(cache: torch.Tensor, blocks: list[int], book: BookLengths) -> Coded:
    """Read a codebook from blocks of a cache [blocks, KV, N, 2 D]."""
    rows = cache[torch.tensor(blocks)].numpy().transpose(1, 0, 2, 3)
    rows = rows.reshape(rows.shape[0], -1, rows.shape[3])  # [KV, slots, 2 D]
    dim, count = rows.shape[2] // 2, book.num_tokens
    entries = rows[:, : book.num_entries].astype(np.float64)
    codes = np.ascontiguousarray(rows[:, book.num_entries : book.num_slots]).view(np.uint16)
    run = 1
    while 6 * 2 * run <= codes.shape[2]:
        run *= 2
    place = np.arange(count)
    of_token = [codes[:, place // run, kind * run + place % run] for kind in range(6)]
    key_index, value_index, key_length, value_length, low, high = of_token
    lengths = [each.view(np.float16).astype(np.float64) for each in (key_length, value_length)]
    return Coded(
        positions=low.astype(np.int64) + (high.astype(np.int64) << 16),
        keys=Vectors(entries[..., :dim], key_index.astype(np.int64), lengths[0]),
        values=Vectors(entries[..., dim:], value_index.astype(np.int64), lengths[1]),
    )


def rotated(vectors: np.ndarray, positions: np.ndarray, model: str) -> np.ndarray:
    """RoPE of a Llama-like model: channels (i, i + D / 2) turn by position / theta^(2 i / D)."""
    fields = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    dim = vectors.shape[-1]
    powers = np.arange(0, dim, 2) / dim
    angles = positions[..., None] * fields["rope_parameters"]["rope_theta"] ** -powers
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = vectors[..., : dim // 2], vectors[..., dim // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def cosines(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """[...] cosine of vectors [..., D]."""
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(true, axis=-1)
    return (found * true).sum(axis=-1) / lengths

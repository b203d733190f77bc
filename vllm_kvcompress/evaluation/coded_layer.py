"""One layer's survivors in a codebook: the books, what they take, and what they give back.

Survivors are rounded to the cache's dtype, entries too, lengths to float16, as the cache stores
them. Coded are those that fill whole blocks; the rest of the last block stays as it is.

Dimensions: H query heads, KV key-value heads, D head_dim, n survivors, c of them coded, E entries,
q queries.
"""

import time
from dataclasses import dataclass

import torch

from vllm_kvcompress.kernels.codebook.book import Codebook
from vllm_kvcompress.kernels.codebook.format import codes_per_row
from vllm_kvcompress.kernels.dispatch import backend_of
from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.lengths.codebook import book_lengths

_LARGEST_LENGTH = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Options:
    """What is tried.

    Attributes
    ----------
    shares : tuple of float
        Entries, as shares of the coded tokens.
    key_threshold, value_threshold : float
        Cosines above which an entry stands for a vector.
    block_size : int
        Tokens per block.
    dtype : torch.dtype
        Of the cache.
    """

    shares: tuple[float, ...]
    key_threshold: float = 0.98
    value_threshold: float = 0.95
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16

    @property
    def thresholds(self) -> tuple[float, float]:
        """Of keys and of values."""
        return self.key_threshold, self.value_threshold


def slots(num_coded: int, share: float, row_width: int, block_size: int) -> tuple[int, int]:
    """Slots that coded tokens take, and how many of these are for entries.

    Parameters
    ----------
    num_coded : int
        Tokens, whole blocks of them.
    share : float
        Entries asked for, as a share of the tokens.
    row_width : int
        int16 that a token's key and value take together.
    block_size : int
        Slots per block.

    Returns
    -------
    tuple[int, int]
        `num_coded` and 0 where a codebook would free no block: there the tokens are not coded.
    """
    found = book_lengths(num_coded, num_coded, (), share, block_size, codes_per_row(row_width))
    if found is None or found.book is None:
        return num_coded, 0
    return found.book.num_slots, found.book.num_entries


@dataclass(frozen=True)
class Survivors:
    """What one layer keeps of a prompt, before it is coded.

    Attributes
    ----------
    keys, values : torch.Tensor
        [KV, n, D] in the cache's dtype, keys after RoPE. The first c are to be coded.
    positions : torch.Tensor
        [KV, n] integer.
    num_coded : int
        c.
    rotary : Rotary
        The layer's.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    num_coded: int
    rotary: Rotary


@dataclass(frozen=True)
class LimitedBook:
    """A book cut off behind its first entries.

    Attributes
    ----------
    index : torch.Tensor
        [KV, c] int64, entry numbers.
    cosine : torch.Tensor
        [KV, c] float32 to the entry.
    num_forced : int
        Vectors of all heads that took the nearest entry instead of a similar one.
    """

    index: torch.Tensor
    cosine: torch.Tensor
    num_forced: int


def limit_book(book: Codebook, vectors: torch.Tensor, max_entries: int) -> LimitedBook:
    """What `build_codebook` makes of the same vectors when it must stop at `max_entries`.

    Entries are chosen one after the other, so a smaller book is the larger one's beginning.

    Parameters
    ----------
    book : Codebook
        Of KV problems that have all c vectors, built without a limit.
    vectors : torch.Tensor
        [KV, c, D] it was built on.
    max_entries : int
        E, at least 1.
    """
    index, cosine, num_forced = book.index.long(), book.cosine.clone(), 0
    if max_entries < book.entries.shape[1]:
        units = _units(vectors.float(), book.magnitude)
        for head, entries in enumerate(book.entries[:, :max_entries].long()):
            left = index[head] >= max_entries
            if left.any():
                products = units[head, left] @ units[head, entries[entries >= 0]].T
                cosine[head, left], index[head, left] = products.clamp(-1, 1).max(dim=1)
                num_forced += int(left.sum())
    return LimitedBook(index, cosine, num_forced)


def _units(vectors: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[..., D] / [...]; zero where the length is."""
    return torch.where(lengths[..., None] > 0, vectors / lengths[..., None], 0.0)


class CodedLayer:
    """Books of one layer, and what they give back of its survivors.

    Parameters
    ----------
    survivors : Survivors
        What they are built on; at least one token to code.
    options : Options
        Thresholds and sizes.

    Attributes
    ----------
    books : tuple[Codebook, Codebook]
        Of keys and of values, without limit; KV problems each.
    seconds : tuple[float, float]
        What building them took, all KV heads of the layer together.
    """

    def __init__(self, survivors: Survivors, options: Options) -> None:
        self.survivors, self.options = survivors, options
        coded = slice(0, survivors.num_coded)
        positions = survivors.positions[:, coded]
        before = survivors.rotary.rotate(survivors.keys[:, coded], -positions)
        self.vectors = (before.contiguous(), survivors.values[:, coded].contiguous())
        timed = [
            _timed_build(vectors, threshold)
            for vectors, threshold in zip(self.vectors, options.thresholds, strict=True)
        ]
        self.books = (timed[0][0], timed[1][0])
        self.seconds = (timed[0][1], timed[1][1])

    @property
    def row_width(self) -> int:
        """int16 that a token's key and value take together."""
        keys = self.survivors.keys
        return keys.shape[2] * keys.element_size()

    @property
    def needed_share(self) -> float:
        """Entries of the largest of all books, as a share of the coded tokens."""
        most = max(int(book.num_entries.max()) for book in self.books)
        return most / self.survivors.num_coded

    def slots(self, share: float) -> tuple[int, int]:
        """Slots taken, and those for entries; see the function of this name."""
        size = self.options.block_size
        return slots(self.survivors.num_coded, share, self.row_width, size)

    def limited(self, max_entries: int) -> tuple[LimitedBook, LimitedBook]:
        """Both books, cut off."""
        keys, values = (
            limit_book(book, vectors, max_entries)
            for book, vectors in zip(self.books, self.vectors, strict=True)
        )
        return keys, values

    def restored(self, max_entries: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys after RoPE and values [KV, n, D] float32 that attention would see."""
        found = []
        for book, cut, vectors in zip(
            self.books, self.limited(max_entries), self.vectors, strict=True
        ):
            units = _units(vectors.float(), book.magnitude).to(vectors.dtype).float()
            heads = torch.arange(len(vectors), device=vectors.device)[:, None]
            members = book.entries.long()[heads, cut.index]
            lengths = book.magnitude.clamp(max=_LARGEST_LENGTH).half().float()
            found.append(units[heads, members] * lengths[..., None])
        survivors, count = self.survivors, self.survivors.num_coded
        keys = survivors.rotary.rotate(found[0], survivors.positions[:, :count])
        return (
            torch.cat([keys, survivors.keys[:, count:].float()], dim=1),
            torch.cat([found[1], survivors.values[:, count:].float()], dim=1),
        )


def _timed_build(vectors: torch.Tensor, threshold: float) -> tuple[Codebook, float]:
    device, count = vectors.device, vectors.shape[1]
    build = backend_of(device).build_codebook
    lengths = torch.full((len(vectors),), count, dtype=torch.int32, device=device)
    if device.type == "cuda":  # the first launch of a shape compiles it
        build(vectors, lengths, threshold, count)
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    book = build(vectors, lengths, threshold, count)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return book, time.perf_counter() - started


def attention_output(
    queries: torch.Tensor,
    query_positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Causal attention over survivors.

    Parameters
    ----------
    queries : torch.Tensor
        [H, q, D] after RoPE.
    query_positions : torch.Tensor
        [q] integer.
    keys, values : torch.Tensor
        [KV, n, D], keys after RoPE. Every query sees at least one of them.
    positions : torch.Tensor
        [KV, n] integer.
    scale : float
        Softmax scale.

    Returns
    -------
    torch.Tensor
        [H, q, D] float32.
    """
    grouped = queries.float().unflatten(0, (len(keys), -1))  # [KV, g, q, D]
    logits = grouped @ keys.float().transpose(1, 2)[:, None] * scale
    hidden = positions[:, None, None] > query_positions[:, None]
    weights = logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return (weights @ values.float()[:, None]).flatten(0, 1)


def relative_errors(exact: torch.Tensor, found: torch.Tensor) -> list[float]:
    """|O - O'| / |O| of every query over all heads; outputs are [H, q, D]."""
    size = exact.norm(dim=(0, 2))
    error = (exact - found).norm(dim=(0, 2))
    return torch.where(error > 0, error / size, 0.0).tolist()

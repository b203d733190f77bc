"""Tokens as entries of two codebooks, one of keys and one of values, and what they are read as.

    key[t]   = rotate(key_entry[i[t]] * a[t], position[t])
    value[t] = value_entry[j[t]] * b[t]

Keys are taken before RoPE. Entries are unit vectors of some of the tokens, a and b the tokens' own
lengths (SpindleKV, arXiv 2507.06517). A first set of tokens gets the greedy cover of
`kernels.codebook.build`; tokens that come later take an entry that is similar enough, and the cover
is made anew of those that find none, while there is room in the book.

Dimensions: P books (layers times KV heads of one request), E slots for entries, n tokens, D
head_dim, W int16 per slot row, T tokens per row of codes.
"""

from dataclasses import dataclass, fields

import torch
from torch.nn.functional import pad

from vllm_kvcompress.kernels.codebook.book import SHORTEST, Codebook
from vllm_kvcompress.kernels.codebook.packing import pack_codes, unpack_codes
from vllm_kvcompress.kernels.dispatch import backend_of
from vllm_kvcompress.kernels.formulas.rotary import Rotary

MAX_GRAPH_BYTES = 2**31
"""Of graphs that are made at once, n * n / 8 each: vLLM has given most memory to its cache.

One multiprocessor covers one book, an entry after the other, and of a long prompt one layer's books
are made at a time: eight of Llama-3-8B side by side, up to 46,340 survivors. The preset spindlekv
has 45,859 of a prompt of 128k tokens, whose graphs take 251 MiB each.
"""


@dataclass(frozen=True)
class Directions:
    """One kind of vector, keys or values, as entries and lengths.

    Attributes
    ----------
    entries : torch.Tensor
        [P, E, D] float32 unit vectors; zeros behind a book's last one.
    num_entries : torch.Tensor
        [P] int64.
    index : torch.Tensor
        [P, n] int64, number of each token's entry.
    length : torch.Tensor
        [P, n] float32.
    """

    entries: torch.Tensor
    num_entries: torch.Tensor
    index: torch.Tensor
    length: torch.Tensor

    def read(self) -> torch.Tensor:
        """[P, n, D] float32: the vectors that entries and lengths stand for."""
        index = self.index[..., None].expand(-1, -1, self.entries.shape[2])
        return self.entries.gather(1, index) * self.length[..., None]


@dataclass(frozen=True)
class Distance:
    """How well entries stand for the vectors that were coded last.

    Attributes
    ----------
    num_vectors : int
        P * n.
    num_forced : torch.Tensor
        [] int64: vectors for which the book had no similar entry and no room.
    forced_distance : torch.Tensor
        [] float32: sum of 1 - cosine over these.
    num_new : torch.Tensor
        [] int64: entries that were added.
    """

    num_vectors: int
    num_forced: torch.Tensor
    forced_distance: torch.Tensor
    num_new: torch.Tensor


def first_directions(
    vectors: torch.Tensor, threshold: float, max_entries: int
) -> tuple[Directions, Distance]:
    """Code vectors by a book made of some of them.

    Parameters
    ----------
    vectors : torch.Tensor
        [P, n, D] float32, float16 or bfloat16, n >= 1.
    threshold : float
        Cosine above which an entry stands for a vector.
    max_entries : int
        E.
    """
    counts = torch.full(
        vectors.shape[:1], vectors.shape[1], dtype=torch.int32, device=vectors.device
    )
    book = _build(vectors, counts, threshold, max_entries)
    entries = _unit(_rows(vectors, book.entries.clamp(min=0).long()))
    entries.masked_fill_((book.entries < 0)[..., None], 0)
    found = Directions(entries, book.num_entries.long(), book.index.long(), book.magnitude)
    distance = Distance(
        num_vectors=book.index.numel(),
        num_forced=book.num_forced.sum(),
        forced_distance=((1 - book.cosine) * (book.cosine <= threshold)).sum(),
        num_new=book.num_entries.sum(),
    )
    return found, distance


def more_directions(
    old: Directions, vectors: torch.Tensor, threshold: float, max_entries: int
) -> tuple[Directions, Distance]:
    """Code more vectors by a book that exists and may get more entries.

    Parameters
    ----------
    old : Directions
        The book, and what is coded by it: entry numbers stay.
    vectors, threshold, max_entries
        As for `first_directions`, of the tokens behind; E is no smaller than the old one.

    Returns
    -------
    tuple
        All tokens, old ones first; and how well the new ones fared.
    """
    num_books, count, _ = vectors.shape
    room = max_entries - old.entries.shape[1]
    entries, used = pad(old.entries, (0, 0, 0, room)), old.num_entries
    exact = vectors.float()
    length = exact.norm(dim=2)
    length = torch.where(length < SHORTEST, 0.0, length)
    unit = _unit(exact)
    best, index = _nearest(unit, entries, used)
    # Whatever entry a vector of no length has, it is read as zero.
    lonely = (best <= threshold) & (length > 0)
    # A cover of those without an entry, moved together. What it finds first stands for most.
    order = lonely.logical_not().to(torch.uint8).sort(dim=1, stable=True).indices
    cover = _build(_rows(vectors, order), lonely.sum(dim=1).int(), threshold, count)
    taken = torch.minimum(cover.num_entries.long(), max_entries - used)
    slots = torch.arange(count, device=vectors.device).expand(num_books, -1)
    is_new = slots < taken[:, None]
    members = order.gather(1, cover.entries.clamp(min=0).long())
    # Entries that found no room are written behind the book's last slot, which is cut off.
    target = torch.where(is_new, used[:, None] + slots, max_entries)
    width = entries.shape[2]
    entries = pad(entries, (0, 0, 0, 1)).scatter(
        1, target[..., None].expand(-1, -1, width), _rows(unit, members)
    )[:, :max_entries]
    found = torch.where(cover.index < taken[:, None], used[:, None] + cover.index, -1)
    own = torch.full_like(index, -1).scatter(1, order, found)
    best, nearest = _nearest(unit, entries, used + taken)
    forced = lonely & (own < 0)
    new = torch.where(lonely, torch.where(forced, nearest, own), index)
    whole = Directions(
        entries,
        used + taken,
        torch.cat([old.index, new], dim=1),
        torch.cat([old.length, length], dim=1),
    )
    far = torch.where(forced, 1 - best, 0.0).sum()
    return whole, Distance(num_books * count, forced.sum(), far, taken.sum())


def graph_bytes(num_vectors: int) -> int:
    """Of the graph that the cover of one book reads: a bit for each pair, rows of whole words."""
    return 4 * num_vectors * -(-num_vectors // 32)


def books_at_once(num_books: int, num_vectors: int) -> int:
    """Books of so many vectors that are covered side by side."""
    return min(max(MAX_GRAPH_BYTES // max(graph_bytes(num_vectors), 1), 1), num_books)


def _build(
    vectors: torch.Tensor, counts: torch.Tensor, threshold: float, max_entries: int
) -> Codebook:
    """Books of [P, n, D] vectors, as many at a time as graphs of `MAX_GRAPH_BYTES` allow."""
    build = backend_of(vectors.device).build_codebook
    size = books_at_once(len(vectors), vectors.shape[1])
    parts = [
        build(some.contiguous(), own, threshold, max_entries)
        for some, own in zip(vectors.split(size), counts.split(size), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    columns = [[getattr(part, each.name) for part in parts] for each in fields(Codebook)]
    return Codebook(*(torch.cat(column) for column in columns))


def _rows(vectors: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[P, m, D] rows of [P, n, D] at [P, m] places."""
    return vectors.gather(1, places[..., None].expand(-1, -1, vectors.shape[2]))


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors as float32 of length 1; zeros where there is no direction."""
    exact = vectors.float()
    length = exact.norm(dim=-1, keepdim=True)
    return torch.where(length < SHORTEST, 0.0, exact / length.clamp(min=SHORTEST))


def _nearest(
    unit: torch.Tensor, entries: torch.Tensor, num_entries: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine [P, n] with the nearest entry, and its number [P, n]."""
    cosine = unit @ entries.transpose(1, 2)
    unused = torch.arange(entries.shape[1], device=entries.device) >= num_entries[:, None]
    best = cosine.masked_fill(unused[:, None], -2).max(dim=2)
    return best.values, best.indices


@dataclass(frozen=True)
class CodedTokens:
    """The coded tokens of one request, of P books.

    Attributes
    ----------
    keys, values : Directions
        Keys before RoPE, and values.
    positions : torch.Tensor
        [P, n] int64, where in the sequence the tokens were.
    """

    keys: Directions
    values: Directions
    positions: torch.Tensor

    @property
    def num_entries(self) -> torch.Tensor:
        """[2, P] int64: entries of the keys' and the values' book."""
        return torch.stack([self.keys.num_entries, self.values.num_entries])

    def read(self, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys after RoPE and values, [P, n, D] float32 each."""
        return rotary.rotate(self.keys.read(), self.positions), self.values.read()

    def pack(self, num_code_rows: int, width: int) -> torch.Tensor:
        """Slot rows of codes, [P, num_code_rows, W] int16; zeros behind the last token's."""
        rows = pack_codes(
            self.keys.index, self.values.index, self.keys.length, self.values.length,
            self.positions, width,
        )  # fmt: skip
        return pad(rows, (0, 0, 0, num_code_rows - rows.shape[1]))

    @classmethod
    def unpack(
        cls,
        entries: tuple[torch.Tensor, torch.Tensor],
        num_entries: torch.Tensor,
        rows: torch.Tensor,
        num_tokens: int,
    ) -> "CodedTokens":
        """What slots hold: see `CodedTokens` and `pack`.

        Parameters
        ----------
        entries : tuple of torch.Tensor
            Slots for entries of keys and of values, [P, E, D] each, of any float dtype.
        num_entries : torch.Tensor
            [2, P].
        rows : torch.Tensor
            [P, C, W] int16.
        num_tokens : int
            n.
        """
        key_index, value_index, key_length, value_length, positions = unpack_codes(rows, num_tokens)
        keys, values = (each.float() for each in entries)
        counts = num_entries.long()
        return cls(
            Directions(keys, counts[0], key_index.long(), key_length),
            Directions(values, counts[1], value_index.long(), value_length),
            positions.long(),
        )


def code_tokens(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    rotary: Rotary,
    thresholds: tuple[float, float],
    max_entries: int,
    old: CodedTokens | None = None,
) -> tuple[CodedTokens, tuple[Distance, Distance]]:
    """Code tokens, behind others that are coded already.

    Parameters
    ----------
    keys, values : torch.Tensor
        [P, n, D] as cached: keys after RoPE.
    positions : torch.Tensor
        [P, n] int64.
    rotary : Rotary
        The layers' rotary embedding.
    thresholds : tuple of float
        Of keys and of values.
    max_entries : int
        E.
    old : CodedTokens or None
        Tokens that are coded, and their book.

    Returns
    -------
    tuple
        All tokens; and of keys and of values how well the new ones fared.
    """
    bare = rotary.rotate(keys, -positions)
    key_threshold, value_threshold = thresholds
    if old is None:
        coded, key_distance = first_directions(bare, key_threshold, max_entries)
        more, value_distance = first_directions(values, value_threshold, max_entries)
        return CodedTokens(coded, more, positions), (key_distance, value_distance)
    coded, key_distance = more_directions(old.keys, bare, key_threshold, max_entries)
    more, value_distance = more_directions(old.values, values, value_threshold, max_entries)
    whole = torch.cat([old.positions, positions], dim=1)
    return CodedTokens(coded, more, whole), (key_distance, value_distance)

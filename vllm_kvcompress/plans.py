"""Plain data that the scheduler process and the worker process share (picklable, stdlib only).

Notation used throughout the project, for one request and one layer group:

* ``region_len`` R: the compacted region [0, R), in physical indices, a multiple of the block size;
* ``kept_len`` K: tokens of the region that survive, a multiple of the block size, K < R;
* ``evicted``: the sum of R - K over all compactions so far; physical index of a token behind the
  last region = logical position - evicted. Before the first compaction the two are the same.
"""

from dataclasses import dataclass
from enum import Enum

Span = tuple[int, int]
"""A half-open range of positions [start, end)."""


@dataclass(frozen=True)
class BookLengths:
    """Sizes of one request's codebook in one layer group.

    Coded tokens take no slots of their own. Their request's blocks begin with `num_entries` slots
    of entries, then come `num_code_rows` slots of codes, then the tokens that are not coded.

    Attributes
    ----------
    num_tokens : int
        Coded tokens.
    num_entries : int
        Slots for entries, used or not, a multiple of the block size.
    num_code_rows : int
        Slots for codes, a multiple of the block size.
    """

    num_tokens: int
    num_entries: int
    num_code_rows: int

    @property
    def num_slots(self) -> int:
        """Slots before the first token that is not coded."""
        return self.num_entries + self.num_code_rows


@dataclass(frozen=True)
class GroupLengths:
    """Lengths of one layer group's compaction, in slots. See the module docstring.

    Attributes
    ----------
    region_len, kept_len : int
        R and K.
    book : BookLengths or None
        What the K slots hold where survivors are coded: ``book.num_slots`` is K then.
    coded_before : int
        Tokens of the region that are coded already.
    held_before : int
        Slots of the region that these take.
    """

    region_len: int
    kept_len: int
    book: BookLengths | None = None
    coded_before: int = 0
    held_before: int = 0

    @property
    def evicted(self) -> int:
        """Slots the group gives up, by which all later indices move."""
        return self.region_len - self.kept_len

    @property
    def num_survivors(self) -> int:
        """Tokens that are in the cache afterwards, of those the region held."""
        return self.kept_len if self.book is None else self.book.num_tokens

    @property
    def tokens_evicted(self) -> int:
        """Tokens that are lost."""
        return self.region_len - self.held_before + self.coded_before - self.num_survivors


@dataclass(frozen=True)
class GroupCache:
    """What one layer group holds of one request, in physical indices.

    Attributes
    ----------
    num_tokens : int
        Slots in use; where a codebook leads them, ``book.num_slots`` and the tokens behind it.
    permanent : tuple[Span, ...]
        Tokens that no compaction evicts (sinks and pins), disjoint and ascending.
    book : BookLengths or None
        The codebook that the slots begin with.
    """

    num_tokens: int
    permanent: tuple[Span, ...]
    book: BookLengths | None = None


class PlanKind(Enum):
    """What the destinations of one group hold.

    ``TOKENS``: survivors as they are. ``TOKENS_IN_PLACE``: likewise, where some destinations are
    source blocks too. ``CODES``: survivors as entries of a new codebook. ``MORE_CODES``: the
    codebook that is there, and codes of all full blocks behind it.
    """

    TOKENS = "tokens"
    TOKENS_IN_PLACE = "tokens in place"
    CODES = "codes"
    MORE_CODES = "more codes"


@dataclass(frozen=True)
class GroupPlan:
    """What the worker does to one request in one KV cache group.

    Attributes
    ----------
    lengths : GroupLengths
        Region and survivors, in slots.
    cache : GroupCache
        What the group holds before the compaction; `cache.num_tokens` tokens are scored.
    forced : tuple[Span, ...]
        Physical indices that survive whatever their score.
    source_blocks : tuple[int, ...]
        The ``region_len / block_size`` blocks that hold the region.
    destination_blocks : tuple[int, ...]
        The ``kept_len / block_size`` private blocks that receive the survivors, or their codebook:
        entries first, then codes. Where the pool had too few, some are source blocks: everything
        must be read before anything is written.
    tail_blocks : tuple[int, ...]
        The request's blocks behind the region; they are re-linked, not copied.
    in_place : bool
        Whether destinations are among the source blocks.
    """

    lengths: GroupLengths
    cache: GroupCache
    forced: tuple[Span, ...]
    source_blocks: tuple[int, ...]
    destination_blocks: tuple[int, ...]
    tail_blocks: tuple[int, ...]
    in_place: bool = False

    @property
    def kind(self) -> PlanKind:
        """What the destination blocks will hold."""
        if self.lengths.book is None:
            return PlanKind.TOKENS_IN_PLACE if self.in_place else PlanKind.TOKENS
        return PlanKind.MORE_CODES if self.lengths.coded_before else PlanKind.CODES

    @property
    def block_row(self) -> tuple[int, ...]:
        """The request's block table row after the compaction."""
        return self.destination_blocks + self.tail_blocks


class Purpose(Enum):
    """What becomes of a plan's survivors.

    ``EVICT``: the request goes on over them; its own blocks are given back. ``ADOPT``: likewise,
    and an equal request has written them: nothing is scored or copied. ``COPIED_VIEW``: they
    are copied to blocks beside the request's own, for drafts to read. ``LINKED_VIEW``: drafts read
    some of the request's own blocks; there are no destinations, and the worker chooses
    ``kept_len / block_size`` source blocks.
    """

    EVICT = "evict"
    ADOPT = "adopt"
    COPIED_VIEW = "copied view"
    LINKED_VIEW = "linked view"

    @property
    def is_view(self) -> bool:
        """Whether the request keeps what it holds."""
        return self in (Purpose.COPIED_VIEW, Purpose.LINKED_VIEW)

    @property
    def is_copied(self) -> bool:
        """Whether survivors are chosen and written to destination blocks."""
        return self in (Purpose.EVICT, Purpose.COPIED_VIEW)


@dataclass(frozen=True)
class CompactionPlan:
    """One request's compaction, decided by the scheduler and executed by every worker.

    Attributes
    ----------
    request_id : str
        The engine's request id.
    position : int
        Tokens of the sequence that are compacted: the prompt's length, or more while decoding.
    while_decoding : bool
        Whether generated tokens triggered it, not the end of the prompt.
    seed : int
        Checksum of the prompt's tokens, for policies that draw random numbers.
    groups : tuple[GroupPlan | None, ...]
        One entry per KV cache group; None leaves the group as it is.
    purpose : Purpose
        What becomes of the survivors.
    """

    request_id: str
    position: int
    while_decoding: bool
    seed: int
    groups: tuple[GroupPlan | None, ...]
    purpose: Purpose = Purpose.EVICT


@dataclass(frozen=True)
class RequestOptions:
    """What one request asked for in ``vllm_xargs``; None means "as the server says".

    Attributes
    ----------
    preset : str | None
        Name of a preset, or "none".
    budget_ratio : float | None
        Share of the prompt to keep, in (0, 1].
    budget_tokens : int | None
        Tokens of the prompt to keep.
    pins : tuple[Span, ...]
        Ranges of prompt positions that are never evicted.
    task : str | None
        "localization" or "aggregation"; None leaves it to the server.
    draft_tokens : int | None
        Tokens to draft per step, where the server drafts.
    session : str | None
        Conversation whose compressed cache it continues, and leaves for the next turn.
    shared_prefix : int | None
        Tokens of the prompt that others begin with, too, and that are compressed once for all.
    """

    preset: str | None = None
    budget_ratio: float | None = None
    budget_tokens: int | None = None
    pins: tuple[Span, ...] = ()
    task: str | None = None
    draft_tokens: int | None = None
    session: str | None = None
    shared_prefix: int | None = None

    def shared_len(self, block_size: int) -> int | None:
        """Tokens that are compressed for all: whole blocks; None where nothing is shared."""
        return None if self.shared_prefix is None else self.shared_prefix // block_size * block_size

"""Plain data that the scheduler process and the worker process share (picklable, stdlib only).

Notation used throughout the project, for one request and one layer group:

* ``region_len`` R: the compacted region [0, R), in physical indices, a multiple of the block size;
* ``kept_len`` K: tokens of the region that survive, a multiple of the block size, K < R;
* ``evicted``: the sum of R - K over all compactions so far; physical index of a token behind the
  last region = logical position - evicted. Before the first compaction the two are the same.
"""

from dataclasses import dataclass

Span = tuple[int, int]
"""A half-open range of positions [start, end)."""


@dataclass(frozen=True)
class GroupLengths:
    """Lengths of one layer group's compaction, in tokens. See the module docstring."""

    region_len: int
    kept_len: int

    @property
    def evicted(self) -> int:
        """Tokens the group loses."""
        return self.region_len - self.kept_len


@dataclass(frozen=True)
class GroupCache:
    """What one layer group holds of one request, in physical indices.

    Attributes
    ----------
    num_tokens : int
        Tokens in the cache.
    permanent : tuple[Span, ...]
        Tokens that no compaction evicts (sinks and pins), disjoint and ascending.
    """

    num_tokens: int
    permanent: tuple[Span, ...]


@dataclass(frozen=True)
class GroupPlan:
    """What the worker does to one request in one KV cache group.

    Attributes
    ----------
    lengths : GroupLengths
        Region and survivors, in tokens.
    cache : GroupCache
        What the group holds before the compaction; `cache.num_tokens` tokens are scored.
    forced : tuple[Span, ...]
        Physical indices that survive whatever their score.
    source_blocks : tuple[int, ...]
        The ``region_len / block_size`` blocks that hold the region; never written.
    destination_blocks : tuple[int, ...]
        The ``kept_len / block_size`` private blocks that receive the survivors.
    tail_blocks : tuple[int, ...]
        The request's blocks behind the region; they are re-linked, not copied.
    """

    lengths: GroupLengths
    cache: GroupCache
    forced: tuple[Span, ...]
    source_blocks: tuple[int, ...]
    destination_blocks: tuple[int, ...]
    tail_blocks: tuple[int, ...]

    @property
    def block_row(self) -> tuple[int, ...]:
        """The request's block table row after the compaction."""
        return self.destination_blocks + self.tail_blocks


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
    is_view : bool
        Whether the destination blocks become a view that drafts read, beside the request's own
        blocks, instead of taking their place.
    is_linked : bool
        Whether the view is made of the request's own blocks: there are no destinations, and the
        worker chooses ``kept_len / block_size`` source blocks.
    """

    request_id: str
    position: int
    while_decoding: bool
    seed: int
    groups: tuple[GroupPlan | None, ...]
    is_view: bool = False
    is_linked: bool = False


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
    """

    preset: str | None = None
    budget_ratio: float | None = None
    budget_tokens: int | None = None
    pins: tuple[Span, ...] = ()
    task: str | None = None
    draft_tokens: int | None = None

"""Plain data that the scheduler process and the worker process share (picklable, stdlib only).

Notation used throughout the project, for one request and one layer group:

* ``prompt_len`` P: tokens of the prompt;
* ``region_len`` R: the compacted region [0, R), a multiple of the block size;
* ``kept_len`` K: tokens of the region that survive, a multiple of the block size, K < R;
* ``evicted`` = R - K: physical index of a later token = logical position - evicted.
"""

from dataclasses import dataclass


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
class GroupPlan:
    """What the worker does to one request in one KV cache group.

    Attributes
    ----------
    lengths : GroupLengths
        Region and survivors, in tokens.
    source_blocks : tuple[int, ...]
        The ``region_len / block_size`` blocks that hold the region; never written.
    destination_blocks : tuple[int, ...]
        The ``kept_len / block_size`` private blocks that receive the survivors.
    tail_blocks : tuple[int, ...]
        The request's blocks behind the region; they are re-linked, not copied.
    """

    lengths: GroupLengths
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
    prompt_len : int
        Tokens of the prompt.
    seed : int
        Checksum of the prompt's tokens, for policies that draw random numbers.
    groups : tuple[GroupPlan | None, ...]
        One entry per KV cache group; None leaves the group as it is.
    """

    request_id: str
    prompt_len: int
    seed: int
    groups: tuple[GroupPlan | None, ...]


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
    pins : tuple[tuple[int, int], ...]
        Half-open ranges of prompt positions that are never evicted.
    """

    preset: str | None = None
    budget_ratio: float | None = None
    budget_tokens: int | None = None
    pins: tuple[tuple[int, int], ...] = ()

"""One request's progress through compaction, and why a request is not compressed."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core.draft.views import ViewSchedule
from vllm_kvcompress.lengths.budgets import after_compaction
from vllm_kvcompress.lengths.schedule import Start
from vllm_kvcompress.plans import GroupCache, GroupLengths, Purpose


class Phase(Enum):
    """How far a request's next compaction or view is; planner.py draws the way."""

    RESTING = "resting"
    ARMED = "armed"
    DUE = "due"
    PLANNED = "planned"
    DONE = "done"
    SKIPPED = "skipped"


class SkipReason:
    """Why a request is served uncompressed; values of the metric's `reason` label."""

    OPTED_OUT = "opted_out"
    SHORT_PROMPT = "short_prompt"
    SHORT_OUTPUT = "short_output"
    UNDER_BUDGET = "under_budget"
    STREAMING_INPUT = "streaming_input"
    NO_ROOM = "no_room"
    SHARED_PROMPT = "shared_prompt"
    AMPLE_MEMORY = "ample_memory"
    INVALID_OPTIONS = "invalid_options"
    FAILED = "failed"


@dataclass
class CompactionSchedule:
    """What a request holds, and how much of it the compaction that is due evicts.

    Attributes
    ----------
    caches : list[GroupCache]
        What each layer group held right after the last compaction.
    compacted_at : int
        Sequence length of the last compaction; 0 before the first.
    lengths : list[GroupLengths or None]
        Of the compaction that is due, planned or was last, one entry per layer group; empty where
        nothing is evicted.
    """

    caches: list[GroupCache] = field(default_factory=list)
    compacted_at: int = 0
    lengths: list[GroupLengths | None] = field(default_factory=list)

    def caches_at(self, position: int) -> list[GroupCache]:
        """What the groups hold at a sequence length, before a compaction there."""
        grown = position - self.compacted_at
        return [replace(each, num_tokens=each.num_tokens + grown) for each in self.caches]

    @property
    def evicted(self) -> tuple[int, ...]:
        """Slots that each layer group has given up."""
        return tuple(self.compacted_at - each.num_tokens for each in self.caches)

    def commit(self, position: int) -> None:
        """The compaction at `position` has been done."""
        self.caches = [
            after_compaction(cache, lengths) if lengths else cache
            for cache, lengths in zip(self.caches_at(position), self.lengths, strict=True)
        ]
        self.compacted_at = position


@dataclass
class TrackedRequest:
    """One request's progress.

    Attributes
    ----------
    prompt_len : int
        Tokens of the prompt, as far as compression is concerned.
    config : CompressionConfig or None
        The setting it runs under; None if it opted out.
    task : str or None
        The task its setting was chosen for.
    marks : tuple[int, ...]
        Lengths of the prompt at which it is compacted, ascending.
    next_at : int
        Sequence length at which the next compaction, or the first view, falls due; of a request
        that is RESTING, from which on it may be chosen.
    position : int
        Sequence length of what is due or planned.
    compaction : CompactionSchedule
        What it holds, and what is evicted of that.
    view : ViewSchedule
        What drafts read in the place of that.
    counted : bool
        Whether it has been compressed at least once, before a preemption too.
    was_under_budget : bool
        Whether a compaction fell due that would have freed nothing.
    is_shared : bool
        Whether its compaction waits because others hold its blocks, too.
    query_window, query_gap : int
        Queries that its compactions while decoding read, 0 if none, and the fewest tokens from one
        compaction or view to the next that reads them.
    queries_since : int or None
        Position from which its queries are recorded; None while it has no slot of the ring.
    lacks_queries : bool
        Whether its compaction is due and waits for queries.
    session : str or None
        The conversation it belongs to.
    session_outcome : str or None
        What is to be counted of that once the request starts.
    shared_len : int or None
        Tokens of its prompt that it has in common with others, whole blocks of them: what is
        compressed is these, so `prompt_len` says so, too. None: it has nothing to say of that.
    start : Start or None
        The cache that it began with, of an earlier turn or a shared prefix; None: with nothing.
    peaks : dict[int, list[int]]
        By tokens of the sequence, the most slots that each layer group needs until then.
    """

    prompt_len: int
    config: CompressionConfig | None
    task: str | None = None
    marks: tuple[int, ...] = ()
    next_at: int = 0
    position: int = 0
    phase: Phase = Phase.ARMED
    compaction: CompactionSchedule = field(default_factory=CompactionSchedule)
    view: ViewSchedule = field(default_factory=ViewSchedule)
    skip_reason: str | None = None
    counted: bool = False
    was_under_budget: bool = False
    is_shared: bool = False
    query_window: int = 0
    query_gap: int = 0
    queries_since: int | None = None
    lacks_queries: bool = False
    session: str | None = None
    session_outcome: str | None = None
    shared_len: int | None = None
    start: Start | None = None
    peaks: dict[int, list[int]] = field(default_factory=dict)

    @property
    def num_reused(self) -> int:
        """Tokens that it took over from a kept cache."""
        return 0 if self.start is None else self.start.num_tokens

    @property
    def policy(self) -> str:
        """Name of the policy, for the metrics; "none" for requests that opted out."""
        return self.config.policy.name if self.config else "none"

    @property
    def waits_for_pressure(self) -> bool:
        """Whether it is compacted only while memory is scarce."""
        return self.config is not None and self.config.waits_for_pressure

    @property
    def lacks_blocks_of_its_own(self) -> bool:
        """Whether a compaction waits, because others hold its blocks, that it may not fit without.

        A prompt that is compacted on its way need not fit into the pool as a whole.
        """
        is_waiting = self.phase is Phase.DUE and self.is_shared
        return is_waiting and self.config is not None and self.config.compresses_in_prompts

    @property
    def work(self) -> list[tuple[Purpose, Sequence[GroupLengths | None]]]:
        """What is due or planned: an eviction, a view, or both from one region; in this order."""
        found: list[tuple[Purpose, Sequence[GroupLengths | None]]] = []
        if any(self.compaction.lengths):
            found.append((Purpose.EVICT, self.compaction.lengths))
        if any(self.view.lengths):
            found.append((self.view.purpose, self.view.lengths))
        return found

    @property
    def while_decoding(self) -> bool:
        """Whether the next or current compaction is triggered by generated tokens."""
        return self.next_at > self.prompt_len

    def is_undisturbed(self, num_computed: int) -> bool:
        """Whether up to so many tokens no step ends early for it, and nothing is due or recorded.

        Asked for every request in every step, so it says no where it would have to look closer.
        """
        phase = self.phase
        if phase is Phase.ARMED:
            # No mark lies between what is computed and the next trigger, and no query that is read
            # before that trigger's window.
            return num_computed < self.next_at and num_computed <= self.next_at - self.query_window
        if phase is Phase.DONE:
            return not self.view.is_alone  # else another view may follow
        return phase is Phase.SKIPPED or phase is Phase.RESTING

    def stop_behind(self, position: int) -> int | None:
        """The next length behind `position` at which a step must end; None if there is none.

        While a compaction inside the prompt waits, because others hold its blocks, the mark behind
        it comes: then that one is due.
        """
        ahead = (mark for mark in (self.next_at, *self.marks) if mark > position)
        return min(ahead, default=None)

    @property
    def queries_from(self) -> int | None:
        """Position from which its queries must be recorded; None if none will be read."""
        if not self.query_window or self.phase in (Phase.SKIPPED, Phase.RESTING):
            return None
        if self.waits_for_pressure:
            is_chosen = self.while_decoding and self.phase in (Phase.ARMED, Phase.DUE)
            return max(self.next_at - self.query_window, 0) if is_chosen else None
        if self.phase is Phase.PLANNED:
            following = max(self.position, self.prompt_len) + self.query_gap
        elif self.phase is not Phase.DONE:
            after_prompt = self.prompt_len + self.query_gap
            following = self.next_at if self.while_decoding else after_prompt
        elif self.view.may_be_taken_again:
            following = self.view.taken_at + self.query_gap
        else:
            return None
        return max(following - self.query_window, 0)

    def has_queries(self, position: int) -> bool:
        """Whether those of a compaction at `position` are recorded, or none are read."""
        if not self.query_window:
            return True
        first = max(position - self.query_window, 0)
        return self.queries_since is not None and self.queries_since <= first

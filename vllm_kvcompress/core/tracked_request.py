"""One request's progress through compaction, and why a request is not compressed."""

from dataclasses import dataclass, field
from enum import Enum

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core.draft_history import DraftHistory
from vllm_kvcompress.plans import GroupCache, GroupLengths


class State(Enum):
    """Where a request is; planner.py draws the way from one to the next."""

    ARMED = "armed"
    DUE = "due"
    PLANNED = "planned"
    DONE = "done"
    VIEWED = "viewed"
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
    INVALID_OPTIONS = "invalid_options"


@dataclass
class TrackedRequest:
    """One request's progress.

    Attributes
    ----------
    prompt_len : int
        Tokens of the prompt.
    config : CompressionConfig or None
        The setting it runs under; None if it opted out.
    task : str or None
        The task its setting was chosen for.
    caches : list[GroupCache]
        What each layer group held of it right after the last compaction.
    compacted_at : int
        Sequence length of the last compaction; 0 before the first.
    next_at : int
        Sequence length at which the next compaction falls due.
    position : int
        Sequence length of the compaction that is due or planned.
    lengths : list[GroupLengths or None]
        Its lengths, one entry per layer group.
    view_lengths : list[GroupLengths or None]
        Those of the view that is taken with it, where a cache that evicts is drafted over.
    drafts : DraftHistory or None
        How drafts over its view fare; None without one.
    viewed_at : int
        Sequence length at which its view was taken.
    counted : bool
        Whether it has been compressed at least once, before a preemption too.
    num_waited : int
        Steps since its compaction fell due in which it found no blocks.
    is_shared : bool
        Whether its compaction waits because others hold its blocks, too.
    query_window, query_gap : int
        Queries that its compactions while decoding read, 0 if none, and the fewest tokens from one
        compaction or view to the next that reads them.
    queries_since : int or None
        Position from which its queries are recorded; None while it has no slot of the ring.
    lacks_queries : bool
        Whether its compaction is due and waits for queries.
    """

    prompt_len: int
    config: CompressionConfig | None
    task: str | None = None
    caches: list[GroupCache] = field(default_factory=list)
    compacted_at: int = 0
    next_at: int = 0
    position: int = 0
    lengths: list[GroupLengths | None] = field(default_factory=list)
    view_lengths: list[GroupLengths | None] = field(default_factory=list)
    state: State = State.ARMED
    skip_reason: str | None = None
    drafts: DraftHistory | None = None
    viewed_at: int = 0
    counted: bool = False
    was_under_budget: bool = False
    num_waited: int = 0
    is_shared: bool = False
    query_window: int = 0
    query_gap: int = 0
    queries_since: int | None = None
    lacks_queries: bool = False

    @property
    def policy(self) -> str:
        """Name of the policy, for the metrics; "none" for requests that opted out."""
        return self.config.policy.name if self.config else "none"

    @property
    def is_view_only(self) -> bool:
        """Whether it keeps all it holds, and drafts over views."""
        return self.config is not None and self.config.mode == "draft"

    @property
    def while_decoding(self) -> bool:
        """Whether the next or current compaction is triggered by generated tokens."""
        return self.next_at > self.prompt_len

    @property
    def queries_from(self) -> int | None:
        """Position from which its queries must be recorded; None if none will be read."""
        if not self.query_window or self.state in (State.DONE, State.SKIPPED):
            return None
        if self.state is State.PLANNED:
            following = self.position + self.query_gap
        elif self.state is State.VIEWED:
            following = self.viewed_at + self.query_gap
        else:
            following = self.next_at + (0 if self.while_decoding else self.query_gap)
        return max(following - self.query_window, 0)

    def has_queries(self, position: int) -> bool:
        """Whether those of a compaction at `position` are recorded, or none are read."""
        if not self.query_window:
            return True
        first = max(position - self.query_window, 0)
        return self.queries_since is not None and self.queries_since <= first

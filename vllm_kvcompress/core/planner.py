"""Which requests are compressed, when, and how far. Knows lengths and settings, no vLLM classes.

A request passes through these states:

    ARMED --(its prompt ends)--> DUE --(destination blocks found)--> PLANNED --(next step)--> DONE
      ^                                                                |
      '------------------------ preemption: starts again --------------'

or it is SKIPPED from the start, for a reason that is counted. A request that is DUE while the pool
has no room for its survivors stays DUE and is tried again every step: its lengths do not change.
"""

from dataclasses import dataclass, field
from enum import Enum

from vllm_kvcompress.budgets import compaction_lengths
from vllm_kvcompress.config import CompressionConfig
from vllm_kvcompress.plans import GroupLengths, RequestOptions
from vllm_kvcompress.request_options import resolve_request


class State(Enum):
    """See the module docstring."""

    ARMED = "armed"
    DUE = "due"
    PLANNED = "planned"
    DONE = "done"
    SKIPPED = "skipped"


class SkipReason:
    """Why a request is served uncompressed; values of the metric's `reason` label."""

    OPTED_OUT = "opted_out"
    SHORT_PROMPT = "short_prompt"
    UNDER_BUDGET = "under_budget"
    STREAMING_INPUT = "streaming_input"
    NO_ROOM = "no_room"


@dataclass
class TrackedRequest:
    """One request's progress.

    Attributes
    ----------
    prompt_len : int
        Tokens of the prompt.
    policy : str
        Name of the policy, for the metrics; "none" for skipped requests that opted out.
    lengths : list[GroupLengths or None]
        One entry per layer group.
    num_query_tokens : int
        Last prompt tokens whose queries the policy needs; 0 if none.
    """

    prompt_len: int
    policy: str
    lengths: list[GroupLengths | None]
    num_query_tokens: int = 0
    state: State = State.ARMED
    skip_reason: str | None = None
    counted: bool = False

    @property
    def is_waiting(self) -> bool:
        """Whether a compaction is still to come."""
        return self.state in (State.ARMED, State.DUE)


@dataclass
class Planner:
    """Tracks every request of the engine.

    Attributes
    ----------
    config : CompressionConfig
        The server's setting.
    num_layer_groups : int
        Layer groups of the engine.
    block_size : int
        Tokens per block.
    """

    config: CompressionConfig
    num_layer_groups: int
    block_size: int
    requests: dict[str, TrackedRequest] = field(default_factory=dict)

    def add(
        self, request_id: str, prompt_len: int, options: RequestOptions, streaming: bool = False
    ) -> TrackedRequest:
        """Register a request; its state is ARMED or SKIPPED afterwards."""
        tracked = self._track(prompt_len, options, streaming)
        self.requests[request_id] = tracked
        return tracked

    def _track(self, prompt_len: int, options: RequestOptions, streaming: bool) -> TrackedRequest:
        config = resolve_request(self.config, options)
        if config is None:
            return _skipped(prompt_len, "none", SkipReason.OPTED_OUT)
        policy = config.policy.name
        if streaming:
            return _skipped(prompt_len, policy, SkipReason.STREAMING_INPUT)
        if prompt_len < config.min_prompt_len:
            return _skipped(prompt_len, policy, SkipReason.SHORT_PROMPT)
        lengths = compaction_lengths(prompt_len, config, self.num_layer_groups, self.block_size)
        if not any(lengths):
            return _skipped(prompt_len, policy, SkipReason.UNDER_BUDGET)
        needs_queries = config.build_policy().needs_queries
        window = config.observation_window if needs_queries else 0
        return TrackedRequest(prompt_len, policy, lengths, window)

    def remove(self, request_id: str) -> TrackedRequest | None:
        """Forget a finished or aborted request."""
        return self.requests.pop(request_id, None)

    def restart(self, request_id: str) -> None:
        """A preempted request starts again from nothing."""
        tracked = self.requests.get(request_id)
        if tracked is not None and tracked.state is not State.SKIPPED:
            tracked.state = State.ARMED

    def waiting(self, request_id: str) -> TrackedRequest | None:
        """The request, if a compaction is still to come for it."""
        tracked = self.requests.get(request_id)
        return tracked if tracked is not None and tracked.is_waiting else None

    def clip_chunk(self, request_id: str, num_computed: int, num_new: int) -> int:
        """End a prefill chunk at the end of the prompt.

        A resumed request prefills its prompt and its earlier output in one go; it must stop at
        the prompt's end to be compacted there, as it was the first time.
        """
        tracked = self.waiting(request_id)
        if tracked is None or not num_computed < tracked.prompt_len < num_computed + num_new:
            return num_new
        return tracked.prompt_len - num_computed

    def max_cached_tokens(self, request_id: str) -> int | None:
        """Longest prefix-cache hit the request may take; None if any.

        At least one token, and all tokens whose queries the policy needs, must be computed.
        """
        tracked = self.waiting(request_id)
        if tracked is None:
            return None
        return tracked.prompt_len - max(tracked.num_query_tokens, 1)

    def note_progress(self, request_id: str, num_computed: int) -> bool:
        """Record how far a request was scheduled; True if its compaction is due."""
        tracked = self.waiting(request_id)
        if tracked is None:
            return False
        if tracked.state is State.ARMED and num_computed >= tracked.prompt_len:
            tracked.state = State.DUE
        return tracked.state is State.DUE


def _skipped(prompt_len: int, policy: str, reason: str) -> TrackedRequest:
    return TrackedRequest(prompt_len, policy, [], state=State.SKIPPED, skip_reason=reason)

"""What compression did, counted where it happens.

The scheduler process counts into `CompressionStats`. A snapshot of what is new travels with vLLM's
scheduler statistics to the API server, where prometheus.py adds it to the server's /metrics.
"""

from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

CODEBOOK_MEASURES = ("vectors", "entries", "forced", "forced_distance")

MAX_SAMPLES = 4096
"""Single observations that are kept until they are sent; where vLLM's statistics are off, nobody
takes them, and the oldest go."""


def _samples() -> Any:
    return field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))


def _add(counts: dict[str, int], key: str, amount: int) -> None:
    counts[key] = counts.get(key, 0) + amount


@dataclass
class CompressionStats:
    """Counts since the last snapshot was sent.

    Attributes
    ----------
    requests : dict[str, int]
        Requests compressed at least once, by policy.
    compactions : dict[str, int]
        Compactions committed, by "policy/trigger"; more than `requests` where preempted requests
        ran again, or generated tokens triggered more.
    tokens_evicted : dict[str, int]
        Tokens evicted, by "policy/layer group".
    blocks_taken : dict[str, int]
        Destination blocks that compactions took, by policy.
    blocks_returned : dict[str, int]
        Blocks that the pool got back when compactions were committed, by policy.
    uncompressed : dict[str, int]
        Requests served without compression, by reason.
    failures : dict[str, int]
        Requests whose compression went wrong, by what happened.
    tasks : dict[str, int]
        Requests whose setting depends on their task, by "task/who decided".
    views : dict[str, int]
        Views taken for drafting, by "policy/trigger": "prompt" or "refresh".
    view_tokens : dict[str, int]
        Tokens in these views, averaged over layer groups, by policy.
    views_given_up : dict[str, int]
        Views whose blocks were given back because a request needed them, by policy.
    codebooks : dict[str, float]
        Of "key" and "value" vectors, by "kind/what": coded "vectors", "entries" added, "forced"
        ones, and their "forced_distance".
    session_requests : dict[str, int]
        Requests that named a conversation, by what became of that.
    session_tokens : int
        Prompt tokens that they took over from an earlier turn.
    sessions_kept : int
        Caches that were kept for a next turn.
    sessions_given_back : dict[str, int]
        Those of them that were given back, by reason.
    shared_prefix_requests : dict[str, int]
        Requests that named a shared prefix, by what became of that.
    shared_prefix_tokens : int
        Prompt tokens that they did not compute.
    shared_prefixes_kept : int
        Prefixes that were compressed for all.
    shared_prefixes_given_back : dict[str, int]
        Those of them that were given back, by reason.
    deferrals : int
        Steps that a request had to wait for a slot for its queries, or a view for blocks.
    kept_ratios : deque of (str, float)
        Per compaction: policy, and share of the sequence so far that is still held, averaged
        over layer groups.
    seconds : deque of float
        Per step with compactions: time the worker spent on them.
    """

    requests: dict[str, int] = field(default_factory=dict)
    compactions: dict[str, int] = field(default_factory=dict)
    tokens_evicted: dict[str, int] = field(default_factory=dict)
    blocks_taken: dict[str, int] = field(default_factory=dict)
    blocks_returned: dict[str, int] = field(default_factory=dict)
    uncompressed: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)
    views: dict[str, int] = field(default_factory=dict)
    view_tokens: dict[str, int] = field(default_factory=dict)
    views_given_up: dict[str, int] = field(default_factory=dict)
    codebooks: dict[str, float] = field(default_factory=dict)
    session_requests: dict[str, int] = field(default_factory=dict)
    session_tokens: int = 0
    sessions_kept: int = 0
    sessions_given_back: dict[str, int] = field(default_factory=dict)
    shared_prefix_requests: dict[str, int] = field(default_factory=dict)
    shared_prefix_tokens: int = 0
    shared_prefixes_kept: int = 0
    shared_prefixes_given_back: dict[str, int] = field(default_factory=dict)
    deferrals: int = 0
    kept_ratios: deque[tuple[str, float]] = _samples()
    seconds: deque[float] = _samples()

    def record_compaction(
        self,
        policy: str,
        trigger: str,
        evicted: list[int],
        kept_ratio: float,
        blocks_taken: int,
        blocks_returned: int,
        first: bool,
    ) -> None:
        """Count one committed compaction.

        Parameters
        ----------
        policy : str
            Policy name.
        trigger : str
            "prompt" or "decode".
        evicted : list[int]
            Tokens evicted in each layer group.
        kept_ratio : float
            Share of the sequence that is still held, averaged over layer groups.
        blocks_taken, blocks_returned : int
            Blocks it took for the survivors, and blocks that came free when it was committed.
        first : bool
            Whether this is the request's first compaction.
        """
        if first:
            _add(self.requests, policy, 1)
        _add(self.compactions, f"{policy}/{trigger}", 1)
        for group, tokens in enumerate(evicted):
            _add(self.tokens_evicted, f"{policy}/{group}", tokens)
        _add(self.blocks_taken, policy, blocks_taken)
        _add(self.blocks_returned, policy, blocks_returned)
        self.kept_ratios.append((policy, kept_ratio))

    def record_view(self, policy: str, num_tokens: int, trigger: str) -> None:
        """Count one view of so many tokens, averaged over layer groups."""
        _add(self.views, f"{policy}/{trigger}", 1)
        _add(self.view_tokens, policy, num_tokens)

    def record_view_given_up(self, policy: str) -> None:
        """Count one view that was given back."""
        _add(self.views_given_up, policy, 1)

    def record_codebooks(self, measures: Sequence[Sequence[float]]) -> None:
        """Count what codebooks were made of: of keys and of values, in order, four numbers.

        Vectors coded, entries added, vectors without an entry that is similar enough, and the sum
        of 1 - cosine to the entry over these.
        """
        for kind, numbers in zip(("key", "value"), measures, strict=False):
            for what, number in zip(CODEBOOK_MEASURES, numbers, strict=True):
                place = f"{kind}/{what}"
                self.codebooks[place] = self.codebooks.get(place, 0.0) + number

    def record_task(self, task: str, decided_by: str) -> None:
        """Count one request whose setting depends on its task."""
        _add(self.tasks, f"{task}/{decided_by}", 1)

    def record_uncompressed(self, reason: str) -> None:
        """Count one request that is served without compression."""
        _add(self.uncompressed, reason, 1)

    def record_failure(self, reason: str) -> None:
        """Count one request whose compression went wrong."""
        _add(self.failures, reason, 1)

    def record_session(self, outcome: str, num_tokens: int) -> None:
        """Count one request that named a conversation, and the tokens that it took over."""
        _add(self.session_requests, outcome, 1)
        self.session_tokens += num_tokens

    def record_shared_prefix(self, outcome: str, num_tokens: int) -> None:
        """Count one request that named a shared prefix, and the tokens that it did not compute."""
        _add(self.shared_prefix_requests, outcome, 1)
        self.shared_prefix_tokens += num_tokens

    def record_given_back(self, kind: str, reason: str) -> None:
        """Count one kept cache that was given back; of a "session" or a "shared_prefix"."""
        found = {
            "session": self.sessions_given_back,
            "shared_prefix": self.shared_prefixes_given_back,
        }
        _add(found[kind], reason, 1)

    def clear(self) -> None:
        """Start anew; the object stays, because several parts count into it."""
        vars(self).update(vars(CompressionStats()))

    def snapshot(self) -> dict[str, Any] | None:
        """What was counted, as plain data; None if nothing was."""
        # Asked in every step: what has counted nothing is not copied.
        counted = {
            name: list(value) if isinstance(value, deque) else deepcopy(value)
            for name, value in vars(self).items()
            if value
        }
        return counted or None

"""What compression did, counted where it happens and shown on the server's own /metrics.

The scheduler process counts into `CompressionStats`. A snapshot of what is new travels with
vLLM's scheduler statistics to the API server, whose `PrometheusRecorder` adds it to Prometheus.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from prometheus_client import Counter, Histogram

STATS_KEY = "vllm_kvcompress"
"""Marks our payload among the statistics that travel from scheduler to API server."""

POLICY_LABELS = ("policy",)
KEPT_RATIO_BUCKETS = (0.03, 0.06, 0.12, 0.18, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
CODEBOOK_MEASURES = ("vectors", "entries", "forced", "forced_distance")
CODEBOOK_TEXTS = (
    "Keys and values of tokens that were coded by a codebook, one per layer and KV head.",
    "Entries that codebooks got for them.",
    "Of these keys and values, those without an entry above the threshold in a full codebook.",
    "Sum of 1 - cosine between these and the nearest entry, which stands for them.",
)
SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


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
    deferrals : int
        Steps in which a due compaction found no room for its survivors.
    kept_ratios : list[tuple[str, float]]
        Per compaction: policy, and share of the sequence so far that is still held, averaged
        over layer groups.
    seconds : list[float]
        Per step with compactions: time the worker spent on them.
    """

    requests: dict[str, int] = field(default_factory=dict)
    compactions: dict[str, int] = field(default_factory=dict)
    tokens_evicted: dict[str, int] = field(default_factory=dict)
    blocks_taken: dict[str, int] = field(default_factory=dict)
    blocks_returned: dict[str, int] = field(default_factory=dict)
    uncompressed: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)
    views: dict[str, int] = field(default_factory=dict)
    view_tokens: dict[str, int] = field(default_factory=dict)
    views_given_up: dict[str, int] = field(default_factory=dict)
    codebooks: dict[str, float] = field(default_factory=dict)
    deferrals: int = 0
    kept_ratios: list[tuple[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

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

    def clear(self) -> None:
        """Start anew; the object stays, because several parts count into it."""
        vars(self).update(vars(CompressionStats()))

    def snapshot(self) -> dict[str, Any] | None:
        """What was counted, as plain data; None if nothing was."""
        return {name: value for name, value in asdict(self).items() if value} or None


class PrometheusRecorder:
    """Adds snapshots of `CompressionStats` to the process's Prometheus registry."""

    def __init__(self) -> None:
        self.requests = Counter(
            "vllm:kv_compression_requests", "Requests whose KV cache was compressed.", POLICY_LABELS
        )
        self.compactions = Counter(
            "vllm:kv_compression_compactions",
            "Compactions at the end of a prompt or while decoding, those of requests that were "
            "preempted and ran again included.",
            ("policy", "trigger"),
        )
        self.tokens_evicted = Counter(
            "vllm:kv_compression_tokens_evicted",
            "Tokens evicted, per layer group.",
            ("policy", "layer_group"),
        )
        self.blocks_freed = Counter(
            "vllm:kv_compression_blocks_freed",
            "KV cache blocks given back to the pool by compactions, net of those they took.",
            POLICY_LABELS,
        )
        self.uncompressed = Counter(
            "vllm:kv_compression_uncompressed_requests",
            "Requests served without compression, by reason.",
            ("reason",),
        )
        self.tasks = Counter(
            "vllm:kv_compression_tasks",
            "Requests whose setting depends on their task, by task and by who decided it.",
            ("task", "decided_by"),
        )
        self.views = Counter(
            "vllm:kv_compression_views",
            "Compressed views of a request's cache taken for drafting, at the end of its prompt or "
            "again while decoding.",
            ("policy", "trigger"),
        )
        self.view_tokens = Counter(
            "vllm:kv_compression_view_tokens",
            "Tokens in views when they were taken, averaged over layer groups.",
            POLICY_LABELS,
        )
        self.codebooks = {
            what: Counter(f"vllm:kv_compression_codebook_{what}", text, ("kind",))
            for what, text in zip(CODEBOOK_MEASURES, CODEBOOK_TEXTS, strict=True)
        }
        self.deferrals = Counter(
            "vllm:kv_compression_deferrals",
            "Steps in which a due compaction found no free blocks for its survivors.",
        )
        self.kept_ratio = Histogram(
            "vllm:kv_compression_kept_ratio",
            "Share of the sequence still held after a compaction, averaged over layer groups.",
            POLICY_LABELS,
            buckets=KEPT_RATIO_BUCKETS,
        )
        self.seconds = Histogram(
            "vllm:kv_compression_time_seconds",
            "Time the worker spent scoring, selecting and copying, per step with compactions.",
            buckets=SECONDS_BUCKETS,
        )

    def record(self, snapshot: dict[str, Any]) -> None:
        """Add one `CompressionStats.snapshot`."""
        for name in ("requests", "blocks_freed", "view_tokens"):
            for policy, count in snapshot.get(name, {}).items():
                getattr(self, name).labels(policy).inc(count)
        for name in ("compactions", "tokens_evicted", "tasks", "views"):
            for key, count in snapshot.get(name, {}).items():
                getattr(self, name).labels(*key.rsplit("/", 1)).inc(count)
        for place, number in snapshot.get("codebooks", {}).items():
            kind, what = place.split("/")
            self.codebooks[what].labels(kind).inc(number)
        for reason, count in snapshot.get("uncompressed", {}).items():
            self.uncompressed.labels(reason).inc(count)
        self.deferrals.inc(snapshot.get("deferrals", 0))
        for policy, ratio in snapshot.get("kept_ratios", []):
            self.kept_ratio.labels(policy).observe(ratio)
        for seconds in snapshot.get("seconds", []):
            self.seconds.observe(seconds)


@cache
def recorder() -> PrometheusRecorder:
    """The process's recorder; Prometheus metrics may be registered only once."""
    return PrometheusRecorder()

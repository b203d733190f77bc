"""Our counts on the server's own /metrics, under vLLM's labels and from the first moment on.

Counters and histograms only: they add up over the API servers of ``--api-server-count``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from prometheus_client import Counter, Histogram

PREFIX = "vllm:kv_compression_"
VLLM_LABELS = ("model_name", "engine")

SKIP_REASONS = (
    "opted_out", "short_prompt", "short_output", "under_budget", "streaming_input", "no_room",
    "shared_prompt", "ample_memory", "invalid_options", "failed",
)  # fmt: skip
"""Why a request was served uncompressed; core/tracked_request.py has what each means."""

FAILURES = ("error", "nan_scores", "planning", "drafting", "nan_drafts")
"""What went wrong: worker/compaction/faults.py, and on the scheduler core/compactions.py."""

SESSION_OUTCOMES = (
    "reused", "nothing_kept", "other_setting", "other_tokens", "shared_block", "prefix_cache",
    "uncompressed", "unserved",
)  # fmt: skip
SESSION_REASONS = ("replaced", "limit", "room", "reset", "no_fit", "too_large")
"""What became of a conversation; core/kept_cache.py has them."""
PREFIX_OUTCOMES = ("computed", "reused", "uncompressed", "unserved")
PREFIX_REASONS = ("replaced", "limit", "room", "reset", "too_large")
"""And of a shared prefix."""


@dataclass(frozen=True)
class Family:
    """One family of counters.

    Attributes
    ----------
    source : str
        Field of `CompressionStats`: a dict whose keys are our labels' values, joined by "/".
    text : str
        Its HELP line.
    labels : dict[str, tuple of str]
        Our labels, behind vLLM's, and values that are known beforehand. "policy" and
        "layer_group" are filled in by the recorder.
    """

    source: str
    text: str
    labels: Mapping[str, Sequence[str]]


_POLICY: dict[str, Sequence[str]] = {"policy": ()}
_KIND = {"kind": ("key", "value")}

COUNTERS: dict[str, Family] = {
    "requests": Family("requests", "Requests whose KV cache was compressed.", _POLICY),
    "compactions": Family(
        "compactions",
        "Compactions at the end of a prompt or while decoding, those of requests that were "
        "preempted and ran again included.",
        _POLICY | {"trigger": ("prompt", "decode")},
    ),
    "tokens_evicted": Family(
        "tokens_evicted", "Tokens evicted, per layer group.", _POLICY | {"layer_group": ()}
    ),
    "blocks_taken": Family(
        "blocks_taken", "KV cache blocks that compactions took for the survivors.", _POLICY
    ),
    "blocks_returned": Family(
        "blocks_returned",
        "KV cache blocks that the pool got back when compactions were committed; those that "
        "another request holds, too, do not count.",
        _POLICY,
    ),
    "uncompressed_requests": Family(
        "uncompressed",
        "Requests served without compression, by reason.",
        {"reason": SKIP_REASONS},
    ),
    "failures": Family(
        "failures",
        "Requests whose compression went wrong, which are served without, by what happened.",
        {"reason": FAILURES},
    ),
    "tasks": Family(
        "tasks",
        "Requests whose setting depends on their task, by task and by who decided it.",
        {
            "task": ("localization", "aggregation"),
            "decided_by": ("request", "config", "classifier", "default"),
        },
    ),
    "views": Family(
        "views",
        "Compressed views of a request's cache taken for drafting, at the end of its prompt or "
        "again while decoding.",
        _POLICY | {"trigger": ("prompt", "refresh")},
    ),
    "view_tokens": Family(
        "view_tokens",
        "Tokens in views when they were taken, averaged over layer groups.",
        _POLICY,
    ),
    "views_given_up": Family(
        "views_given_up",
        "Views whose blocks were given back because a request needed them.",
        _POLICY,
    ),
    "session_requests": Family(
        "session_requests",
        "Requests that named a conversation (kv_session), by what became of that.",
        {"outcome": SESSION_OUTCOMES},
    ),
    "session_tokens": Family(
        "session_tokens", "Prompt tokens that they took over from an earlier turn's cache.", {}
    ),
    "sessions_kept": Family(
        "sessions_kept", "Caches that were kept for a conversation's next turn.", {}
    ),
    "sessions_given_back": Family(
        "sessions_given_back",
        "Kept caches that were given back, by reason; what was kept and is neither given back nor "
        "reused is still there.",
        {"reason": SESSION_REASONS},
    ),
    "shared_prefix_requests": Family(
        "shared_prefix_requests",
        "Requests that named a shared prefix (kv_shared_prefix), by what became of that.",
        {"outcome": PREFIX_OUTCOMES},
    ),
    "shared_prefix_tokens": Family(
        "shared_prefix_tokens",
        "Prompt tokens that they did not compute, because the prefix was compressed before.",
        {},
    ),
    "shared_prefixes_kept": Family(
        "shared_prefixes_kept", "Prefixes that were compressed and kept for all.", {}
    ),
    "shared_prefixes_given_back": Family(
        "shared_prefixes_given_back",
        "Kept prefixes that were given back, by reason; what was kept and is not given back is "
        "still there.",
        {"reason": PREFIX_REASONS},
    ),
    "deferrals": Family(
        "deferrals",
        "Steps that a request had to wait for a slot to record queries in, or a view for free "
        "blocks.",
        {},
    ),
    "codebook_vectors": Family(
        "codebook_vectors",
        "Keys and values of tokens that were coded by a codebook, one per layer and KV head.",
        _KIND,
    ),
    "codebook_entries": Family("codebook_entries", "Entries that codebooks got for them.", _KIND),
    "codebook_forced": Family(
        "codebook_forced",
        "Of these keys and values, those without an entry above the threshold in a full codebook.",
        _KIND,
    ),
    "codebook_forced_distance": Family(
        "codebook_forced_distance",
        "Sum of 1 - cosine between these and the nearest entry, which stands for them.",
        _KIND,
    ),
}

KEPT_RATIO_BUCKETS = (0.03, 0.06, 0.12, 0.18, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class PrometheusRecorder:
    """Adds snapshots of `CompressionStats` to the process's Prometheus registry.

    vLLM drops all collectors of its name whenever it builds its own, so a recorder belongs to the
    statistics of one engine and is made after them.

    Parameters
    ----------
    model_name : str
        What vLLM's own metrics carry as ``model_name``.
    engines : iterable of int
        Indices of the engines behind this API server.
    policies : iterable of str
        Policies that are known beforehand: the server's own.
    num_layer_groups : int
        Layer groups of the model.
    """

    def __init__(
        self,
        model_name: str,
        engines: Iterable[int],
        policies: Iterable[str],
        num_layer_groups: int,
    ) -> None:
        self.model_name = model_name
        known = {
            "policy": tuple(policies),
            "layer_group": tuple(str(group) for group in range(num_layer_groups)),
        }
        self.counters = {
            name: Counter(PREFIX + name, family.text, (*VLLM_LABELS, *family.labels))
            for name, family in COUNTERS.items()
        }
        self.kept_ratio = Histogram(
            f"{PREFIX}kept_ratio",
            "Share of the sequence still held after a compaction, averaged over layer groups.",
            (*VLLM_LABELS, "policy"),
            buckets=KEPT_RATIO_BUCKETS,
        )
        self.seconds = Histogram(
            f"{PREFIX}time_seconds",
            "Time the worker spent scoring, selecting and copying, per step with compactions.",
            VLLM_LABELS,
            buckets=SECONDS_BUCKETS,
        )
        for engine in engines:
            place = (model_name, str(engine))
            for name, family in COUNTERS.items():
                values = [known.get(label, found) for label, found in family.labels.items()]
                for each in product(*values):
                    self.counters[name].labels(*place, *each)
            for policy in known["policy"]:
                self.kept_ratio.labels(*place, policy)
            self.seconds.labels(*place)

    def record(self, snapshot: Mapping[str, Any], engine: int = 0) -> None:
        """Add one `CompressionStats.snapshot` of an engine."""
        place = (self.model_name, str(engine))
        for name, family in COUNTERS.items():
            found = snapshot.get(family.source)
            if family.labels and found:
                for key, count in found.items():
                    self.counters[name].labels(*place, *key.rsplit("/", 1)).inc(count)
            elif found:
                self.counters[name].labels(*place).inc(found)
        for key, number in snapshot.get("codebooks", {}).items():
            kind, what = key.split("/")
            self.counters[f"codebook_{what}"].labels(*place, kind).inc(number)
        for policy, ratio in snapshot.get("kept_ratios", ()):
            self.kept_ratio.labels(*place, policy).observe(ratio)
        for seconds in snapshot.get("seconds", ()):
            self.seconds.labels(*place).observe(seconds)

"""All mail between API server, scheduler and workers, typed; one attribute on what vLLM sends.

    API server --(vLLM's request, options in `vllm_xargs`)--> scheduler
    scheduler  --`StepPlan`, with vLLM's ``SchedulerOutput``--> workers
    workers    --`StepReport`, with vLLM's ``ModelRunnerOutput``--> scheduler
    scheduler  --`post_counts`, in vLLM's ``SchedulerStats``--> API server: `take_counts`

A request is judged once, by the scheduler: the workers get its setting with the step that starts
it, and repeat neither the reading of its options nor the arithmetic. The API server only refuses
what the scheduler could not make sense of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.metrics import CompressionStats
from vllm_kvcompress.plans import CompactionPlan

_ATTRIBUTE = "kv_compression"
"""The one attribute that our mail has on the host's objects. It is pickled with them."""

_COUNTS_KEY = "vllm_kvcompress"
"""Marks our payload in the field that ``SchedulerStats`` has for KV connectors."""

ROOM_ATTRIBUTE = "kvcompress_room"
"""Where vLLM's ``KVCacheManager`` carries the scheduler's `Room`; it goes to no other process."""


@dataclass(frozen=True)
class RequestSetup:
    """How a request that starts, or starts again, will be compressed.

    Attributes
    ----------
    config : CompressionConfig
        The setting it runs under.
    marks : tuple[int, ...]
        Lengths of its prompt at which its cache is compacted, or a view taken: the policy's queries
        must be kept until then. Empty if that happens while decoding only.
    evicted : tuple[int, ...]
        Slots that each layer group of the cache it continues has given up; empty where it begins
        with nothing.
    """

    config: CompressionConfig
    marks: tuple[int, ...]
    evicted: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepPlan:
    """Everything the workers need for one step.

    Attributes
    ----------
    setups : dict[str, RequestSetup]
        By request id, of requests that start in this step; one without a setup is never
        compressed.
    plans : list[CompactionPlan]
        What is compacted, and which views are taken, behind the step's forward pass.
    num_draft_steps : int
        Draft steps worth making behind the current step.
    query_slots : dict[str, int]
        Requests whose queries go to a slot of the ring from this step on; -1: to none.
    views_given_up : tuple[str, ...]
        Requests whose views' blocks are no longer theirs from this step on.
    """

    setups: dict[str, RequestSetup] = field(default_factory=dict)
    plans: list[CompactionPlan] = field(default_factory=list)
    num_draft_steps: int = 0
    query_slots: dict[str, int] = field(default_factory=dict)
    views_given_up: tuple[str, ...] = ()

    def attach(self, scheduler_output: Any) -> None:
        """Send it with vLLM's ``SchedulerOutput``, if there is anything in it."""
        if not self.is_empty:
            setattr(scheduler_output, _ATTRIBUTE, self)

    @classmethod
    def of(cls, scheduler_output: Any) -> "StepPlan":
        """What came with a ``SchedulerOutput``; an empty one for vLLM's own dummy steps."""
        return getattr(scheduler_output, _ATTRIBUTE, None) or cls()

    @property
    def is_empty(self) -> bool:
        """Whether the workers need not hear of it: it is as if none had come."""
        return not any(vars(self).values())


@dataclass(frozen=True)
class StepReport:
    """What a worker has measured since its last report.

    Attributes
    ----------
    seconds : tuple[float, ...]
        Times of steps' compactions that are known to have finished.
    codebooks : sequence of sequences of float
        Of keys and of values, four numbers each: `CompressionStats.record_codebooks`. Empty if
        nothing was coded.
    failed : Mapping[str, str]
        By request id, why what this step did to its cache went wrong: it must not be read.
    drafts_failed : Mapping[str, str]
        By request id, why what was drafted for it is worth nothing: it should draft no more.
    """

    seconds: tuple[float, ...] = ()
    codebooks: Sequence[Sequence[float]] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    drafts_failed: Mapping[str, str] = field(default_factory=dict)

    def attach(self, model_runner_output: Any) -> None:
        """Send it with vLLM's ``ModelRunnerOutput``, if there is any news."""
        if any(vars(self).values()):
            setattr(model_runner_output, _ATTRIBUTE, self)

    @classmethod
    def of(cls, model_runner_output: Any) -> "StepReport":
        """What came with a ``ModelRunnerOutput``; an empty one where nothing was measured."""
        return getattr(model_runner_output, _ATTRIBUTE, None) or _NO_REPORT

    def count_into(self, stats: CompressionStats) -> None:
        """Add it to the scheduler's counts."""
        if self is not _NO_REPORT:
            stats.seconds += self.seconds
            stats.record_codebooks(self.codebooks)


_NO_REPORT = StepReport()


def post_counts(scheduler_stats: Any, stats: CompressionStats) -> None:
    """Send what was counted with vLLM's ``SchedulerStats``, and start counting anew.

    These travel as plain data without room for more, so the counts go where those of KV connectors
    would, which are refused.
    """
    if counts := stats.snapshot():
        scheduler_stats.kv_connector_stats = {_COUNTS_KEY: counts}
        stats.clear()


def take_counts(scheduler_stats: Any) -> dict[str, Any] | None:
    """Take out what `post_counts` put in; None if there is nothing.

    vLLM's own loggers must not find it, who expect the statistics of a KV connector.
    """
    payload = getattr(scheduler_stats, "kv_connector_stats", None)
    if not payload or _COUNTS_KEY not in payload:
        return None
    scheduler_stats.kv_connector_stats = None
    return payload[_COUNTS_KEY]

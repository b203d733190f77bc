"""What the scheduler tells the workers beside vLLM's own step, typed and in one attribute.

A request is judged once, where it arrives: the workers get its setting with the step that starts
it, and repeat neither the reading of its options nor the arithmetic.
"""

from dataclasses import dataclass, field
from typing import Any

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.plans import CompactionPlan

_ATTRIBUTE = "kv_compression"

ROOM_ATTRIBUTE = "kvcompress_room"
"""Where vLLM's ``KVCacheManager`` carries the scheduler's `Room`."""


@dataclass(frozen=True)
class RequestSetup:
    """How a request that starts, or starts again, will be compressed.

    Attributes
    ----------
    config : CompressionConfig
        The setting it runs under.
    awaits_prompt : bool
        Whether its cache is compacted, or a view taken, when its prompt ends: the policy's queries
        must be kept until then.
    """

    config: CompressionConfig
    awaits_prompt: bool


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
        """Send it with vLLM's ``SchedulerOutput``, which is pickled whole."""
        setattr(scheduler_output, _ATTRIBUTE, self)

    @classmethod
    def of(cls, scheduler_output: Any) -> "StepPlan":
        """What came with a ``SchedulerOutput``; an empty one for vLLM's own dummy steps."""
        return getattr(scheduler_output, _ATTRIBUTE, None) or cls()

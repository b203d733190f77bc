"""Drafting over compressed views as a feature of the worker."""

from collections.abc import Sequence
from typing import Any

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.messages import StepPlan
from vllm_kvcompress.plans import Purpose
from vllm_kvcompress.worker.batch import CompactionJob
from vllm_kvcompress.worker.draft.faults import PendingNans
from vllm_kvcompress.worker.draft.linked_blocks import choose_blocks
from vllm_kvcompress.worker.draft.speculator import ViewSpeculator
from vllm_kvcompress.worker.draft.token_ids import keep_token_ids_on_host
from vllm_kvcompress.worker.draft.typical_acceptance import TypicalAcceptanceSampler
from vllm_kvcompress.worker.draft.views import DraftViews
from vllm_kvcompress.worker.features import Feature
from vllm_kvcompress.worker.lengths import EvictedLengths
from vllm_kvcompress.worker.queries.taps import QueryTaps


class DraftFeature(Feature):
    """The model drafts for itself over views of requests' caches, beside evictions or without.

    Attributes
    ----------
    views : DraftViews or None
        What drafts read; None until the KV cache exists.
    num_draft_steps : int
        Draft steps worth making behind the current step.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.views: DraftViews | None = None
        self.num_draft_steps = 0
        self._nans_before: PendingNans | None = None

    @staticmethod
    def is_wanted(config: CompressionConfig) -> bool:
        return config.drafts

    @property
    def config(self) -> CompressionConfig:
        """The server's setting."""
        return self.runner.model_state.config

    @property
    def lengths(self) -> EvictedLengths:
        """Evicted slots of all rows; exists once the KV cache does."""
        return self.runner.model_state.lengths

    @property
    def taps(self) -> QueryTaps:
        """What shows queries to their recorders."""
        return self.runner.model_state.taps

    def before_load(self) -> None:
        keep_token_ids_on_host(self.runner.req_states)

    def after_load(self) -> None:
        """Take the place of the speculator that vLLM built for the configuration we gave it.

        It has no name for one of ours.
        """
        runner = self.runner
        runner.speculator = ViewSpeculator(runner.vllm_config, runner.model, self, runner.device)
        thresholds = self.config.draft.typical_thresholds
        if thresholds is not None:
            runner.rejection_sampler = TypicalAcceptanceSampler(
                runner.sampler, runner.speculative_config, runner.device, *thresholds
            )

    def num_block_tables(self) -> int:
        """Blocks of views, and a draft step's."""
        return 2 if self.config.num_draft_tokens else 0

    def bind(self, kv_cache_config: Any) -> None:
        runner = self.runner
        self.views = DraftViews(runner.tables.tensors, runner.block_tables.block_sizes)
        runner.speculator.bind(kv_cache_config, runner.attn_groups, runner.tables)

    def reset_row(self, req_index: int) -> None:
        if self.views is not None:
            self.views.reset_row(req_index)
            self.runner.speculator.reset_row(req_index)

    def begin_step(self, step: StepPlan) -> None:
        """Forget views that the scheduler gave up: their blocks belong to others now."""
        self.num_draft_steps = step.num_draft_steps
        for request_id in step.views_given_up:
            row = self.runner.model_state.row_of(request_id)
            if row is not None:
                self.reset_row(row)

    def compact(self, jobs: Sequence[CompactionJob]) -> None:
        """Choose the blocks of linked views, then let rows have their views."""
        assert self.views is not None
        linked = [job for job in jobs if job.plan.purpose is Purpose.LINKED_VIEW]
        chosen = choose_blocks(self.runner.compactor, linked)
        evicted = {
            job.plan.request_id: [each.lengths.evicted if each else 0 for each in job.plan.groups]
            for job in jobs
            if not job.plan.purpose.is_view
        }
        for job in jobs:
            name = job.plan.request_id
            if job.plan.purpose.is_view:
                blocks = {group: ids for (owner, group), ids in chosen.items() if owner == name}
                self.views.add(job.req_index, job.plan.groups, evicted.get(name), blocks)

    def trim_drafts(self, request_ids: Sequence[str], drafts: list[list[int]]) -> list[list[int]]:
        """As many as the speculator made for each request."""
        counts = self.runner.speculator.counts
        return [
            tokens[: counts.get(request_id, 0)]
            for request_id, tokens in zip(request_ids, drafts, strict=True)
        ]

    def report(self) -> dict[str, Any]:
        failed = self.runner.speculator.take_failed()
        return {"drafts_failed": failed} if failed else {}

    def late_report(self) -> Sequence[PendingNans]:
        """Of the step before: this one's output was sent off before its drafts were made."""
        found, self._nans_before = self._nans_before, self.runner.speculator.take_nans()
        return [found] if found is not None else []

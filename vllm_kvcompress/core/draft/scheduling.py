"""What drafting over views needs of vLLM's scheduler: drafts for those with a view, no others."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from vllm_kvcompress.core.compactions import Compactions
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.messages import StepPlan, StepReport
from vllm_kvcompress.metrics import CompressionStats


class DraftMixin(Scheduler):
    """Comes before ``CompressionMixin`` in the bases; does nothing where nothing is drafted.

    Attributes
    ----------
    planner : Planner
        The phases of all requests, and their views.
    num_draft_tokens : int
        Most tokens that the server drafts per step over a view; 0 if none.
    """

    planner: Planner
    compactions: Compactions
    stats: CompressionStats

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_draft_tokens = self.planner.config.num_draft_tokens
        self._drafts_failed: list[str] = []
        if self.num_draft_tokens:
            # Drafts write keys behind the tokens that are scheduled: their slots must exist.
            self.num_lookahead_tokens = self.num_draft_tokens

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Tell the workers how many draft steps are worth making behind this step."""
        if self._drafts_failed:
            self._end_failed_views()
        output = super().schedule(throttle_prefills)
        if self.num_draft_tokens:
            views = [self.planner.view_of(name) for name in output.num_scheduled_tokens]
            num_steps = max((view.num_draft_steps for view in views if view), default=0)
            replace(StepPlan.of(output), num_draft_steps=num_steps).attach(output)
        return output

    def _end_failed_views(self) -> None:
        """Those whose drafts failed draft no more; a view that is being taken is ended later."""
        names, self._drafts_failed = self._drafts_failed, []
        for name in names:
            view = self.planner.view_of(name)
            if view is None or view.drafts is None:
                continue  # gone, or started over without a view
            self.requests[name].spec_token_ids = []
            if self.compactions.is_planned(name):
                self._drafts_failed.append(name)
            else:
                self.compactions.end_view(name)

    def _clip_drafts(self, request_ids: Iterable[str]) -> None:
        """Leave each request the drafts it asked for, and none without a view to draft over."""
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is not None and request.spec_token_ids:
                view = self.planner.view_of(request_id)
                limit = 0 if view is None else view.num_drafts
                if len(request.spec_token_ids) > limit:
                    request.spec_token_ids = request.spec_token_ids[:limit]

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take the step's drafts, as many as each request is allowed."""
        super().update_draft_token_ids(draft_token_ids)
        if self.num_draft_tokens:
            self._clip_drafts(draft_token_ids.req_ids)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        if self.num_draft_tokens:  # placeholders of asynchronous scheduling
            self._clip_drafts(scheduler_output.num_scheduled_tokens)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """Learn how each request's drafts fared."""
        if self.num_draft_tokens:
            self._observe_step(scheduler_output, model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for name, reason in StepReport.of(model_runner_output).drafts_failed.items():
            if self._is_drafting(name):
                self.stats.record_failure(reason)
                self._drafts_failed.append(name)
        return outputs

    def _is_drafting(self, name: str) -> bool:
        """Whether drafts of it are to come; a NaN is told of every step that was under way."""
        if name not in self.requests or name in self._drafts_failed:
            return False
        view = self.planner.view_of(name)
        return view is not None and view.drafts is not None

    def _observe_step(self, output: SchedulerOutput, results: ModelRunnerOutput) -> None:
        """A verification yields one token more than it accepts; none for a request that is gone."""
        for request_id, drafts in output.scheduled_spec_decode_tokens.items():
            index = results.req_id_to_index.get(request_id)
            if index is None or not results.sampled_token_ids:
                continue  # a step without samples, as the host's own loop allows
            sampled = results.sampled_token_ids[index]
            if drafts and len(sampled):
                self.observe_drafts(request_id, len(drafts), len(sampled) - 1)

    def observe_drafts(self, request_id: str, num_drafts: int, num_accepted: int) -> None:
        """Count one verification of a request's drafts."""
        view = self.planner.view_of(request_id)
        if view is not None:
            view.observe(num_drafts, num_accepted)

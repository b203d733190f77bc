"""Scheduler that plans compactions beside vLLM's own scheduling.

Every step: commit what the previous step compacted, let vLLM schedule, then plan compactions for
the requests whose prompt, or interval of generated tokens, ends in this step. Lengths are known
beforehand, so nothing here waits for the device and async scheduling cannot make anything stale.
"""

from collections.abc import Iterable
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress.config.reading import CONFIG_KEY, parse_config
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core.block_manager import CompressedAttentionManager, register_manager
from vllm_kvcompress.core.compactions import Compactions
from vllm_kvcompress.core.planner import Planner, State, TrackedRequest
from vllm_kvcompress.core.query_slots import QuerySlots
from vllm_kvcompress.core.report import savings_line
from vllm_kvcompress.core.task import RequestClassifier
from vllm_kvcompress.host.checks import check_setting
from vllm_kvcompress.lengths.decode_queries import ring_shape
from vllm_kvcompress.messages import ROOM_ATTRIBUTE, StepPlan, StepReport, post_counts
from vllm_kvcompress.metrics import CompressionStats
from vllm_kvcompress.plans import RequestOptions
from vllm_kvcompress.request_options import (
    check_fits_server,
    choose_task,
    named_config,
    parse_request,
)
from vllm_kvcompress.spec import GroupMap

logger = init_logger(f"vllm.{__name__}")


def _num_unverified(request: Request, num_own: int = 0) -> int:
    """Drafts of earlier steps that count as computed although their verdict is still to come.

    With asynchronous scheduling one step is under way while the next is scheduled: a placeholder
    stands for the token it yields for certain, and one for each of its drafts. `num_own`
    placeholders of the step that is being scheduled do not count.
    """
    return max(request.num_output_placeholders - num_own - 1, 0)


class CompressionMixin(Scheduler):
    """Compression on top of any of vLLM's schedulers; comes first in the bases.

    Attributes
    ----------
    planner : Planner
        States of all requests.
    compactions : Compactions
        What is evicted, and which views are taken, by which rules.
    stats : CompressionStats
        Counts that have not yet been sent to the API server.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        register_manager()
        super().__init__(*args, **kwargs)
        self._managers = self._own_managers()
        group_map = GroupMap.of(manager.kv_cache_spec for manager in self._managers)
        self.compression_config = self._read_config()
        self.planner = Planner(
            config=self.compression_config,
            num_layer_groups=group_map.num_layer_groups,
            block_size=group_map.block_size,
            codes_per_row=group_map.codes_per_row,
            rations_queries=True,
        )
        self.stats = CompressionStats()
        ring = ring_shape(self.vllm_config, self.compression_config)
        self.query_slots = QuerySlots(self.planner, ring.num_slots, self.stats)
        self._classifier = RequestClassifier(self.vllm_config.model_config)
        self.compactions = Compactions(
            self.planner,
            self._managers,
            group_map.layer_groups,
            self.kv_cache_manager.block_pool,
            self.max_model_len,
            self.stats,
        )
        setattr(self.kv_cache_manager, ROOM_ATTRIBUTE, self.compactions.room)
        self.num_draft_tokens = self.compression_config.num_draft_tokens
        if self.num_draft_tokens:
            # Drafts write keys behind the tokens that are scheduled: their slots must exist.
            self.num_lookahead_tokens = self.num_draft_tokens
        logger.info(savings_line(self.compression_config, self.kv_cache_config, self.max_model_len))

    def _read_config(self) -> CompressionConfig:
        config = parse_config(self.vllm_config.additional_config[CONFIG_KEY])
        assert config is not None, "the scheduler is installed only when compression is on"
        return config

    def _own_managers(self) -> list[CompressedAttentionManager]:
        managers = self.kv_cache_manager.coordinator.single_type_managers
        for manager in managers:
            assert isinstance(manager, CompressedAttentionManager), (
                f"KV cache group {manager.kv_cache_group_id} is managed by "
                f"{type(manager).__name__}; the start-up checks should have refused this model"
            )
        return list(managers)

    # --- one step -------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Commit, schedule, plan. What the workers need travels with the output."""
        self.compactions.commit()
        self.query_slots.release_idle(lambda name: self.requests[name].num_computed_tokens)
        output = super().schedule(throttle_prefills)
        names = [new.req_id for new in output.scheduled_new_reqs]
        setups = {name: self.planner.setup_of(name) for name in names}
        self.query_slots.provide(
            (name, (end := self.requests[name].num_computed_tokens) - count, end)
            for name, count in output.num_scheduled_tokens.items()
        )
        drafts = output.scheduled_spec_decode_tokens
        due = [
            self.requests[name]
            for name in output.num_scheduled_tokens
            if self._is_due(name, len(drafts.get(name, ())))
        ]
        plans = self.compactions.plan(due)
        steps = (self.planner.num_draft_steps(each) for each in output.num_scheduled_tokens)
        StepPlan(
            setups={name: setup for name, setup in setups.items() if setup is not None},
            plans=plans,
            num_draft_steps=max(steps, default=0) if self.num_draft_tokens else 0,
            query_slots=self.query_slots.take_changes(),
            views_given_up=self.compactions.take_given_up(),
        ).attach(output)
        return output

    def _is_due(self, request_id: str, num_drafts: int) -> bool:
        request = self.requests[request_id]
        # The step's own output is among the placeholders by now, with what it verifies.
        unverified = num_drafts + _num_unverified(request, 1 + num_drafts)
        return self.planner.note_progress(request_id, request.num_computed_tokens - unverified)

    # --- drafts ---------------------------------------------------------------------------

    def _clip_drafts(self, request_ids: Iterable[str]) -> None:
        """Leave each request the drafts it asked for, and none without a view to draft over."""
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is not None and request.spec_token_ids:
                limit = self.planner.num_draft_tokens(request_id)
                if len(request.spec_token_ids) > limit:
                    request.spec_token_ids = request.spec_token_ids[:limit]

    def _observe_drafts(self, output: SchedulerOutput, results: ModelRunnerOutput) -> None:
        """A verification yields one token more than it accepts; none for a request that is gone."""
        for request_id, drafts in output.scheduled_spec_decode_tokens.items():
            index = results.req_id_to_index.get(request_id)
            if index is None or not results.sampled_token_ids:
                continue  # a step without samples, as the host's own loop allows
            sampled = results.sampled_token_ids[index]
            if drafts and len(sampled):
                self.planner.observe_drafts(request_id, len(drafts), len(sampled) - 1)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take the step's drafts, as many as each request is allowed."""
        super().update_draft_token_ids(draft_token_ids)
        if self.num_draft_tokens:
            self._clip_drafts(draft_token_ids.req_ids)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        if self.num_draft_tokens:  # placeholders of asynchronous scheduling
            self._clip_drafts(scheduler_output.num_scheduled_tokens)

    # --- host overrides -------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Decide once, when the request arrives, whether it will be compressed."""
        is_new = request.request_id not in self.requests
        super().add_request(request)
        if not is_new:
            return  # the next chunk of a streaming session, which is never compressed
        tracked = self._judge(request)
        if tracked.skip_reason is not None:
            self.stats.record_uncompressed(tracked.skip_reason)

    def _judge(self, request: Request) -> TrackedRequest:
        """Read a request's options. API servers have checked them, but not all ways lead there."""
        name, prompt_len = request.request_id, request.num_prompt_tokens
        extra = request.sampling_params.extra_args if request.sampling_params else None
        try:
            options = parse_request(extra, prompt_len)
            if options != RequestOptions():
                check_fits_server(self.compression_config, options)
                named = named_config(self.compression_config, options)
                if named is not None and named is not self.compression_config:
                    check_setting(named, self.vllm_config)
            task, decided_by = choose_task(
                self.compression_config, options, lambda: self._classifier.classify(request)
            )
            tracked = self.planner.add(
                name, prompt_len, options, bool(request.resumable), task,
                min(request.max_tokens, self.max_model_len - prompt_len),
            )  # fmt: skip
        except Exception as error:  # the engine's loop ends with whatever is raised here
            logger.warning(
                "KV compression: request %s is served uncompressed; its options did not work out "
                "(%s: %.300s)", name, type(error).__name__, error,
            )  # fmt: skip
            return self.planner.add_invalid(name, prompt_len)
        if task is not None and decided_by is not None:
            self.stats.record_task(task, decided_by)
        return tracked

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.query_slots.release(request.request_id)
        tracked = self.planner.remove(request.request_id)
        if tracked is not None and tracked.skip_reason is not None:
            self.stats.record_uncompressed(tracked.skip_reason)
        freed = super()._free_request(request, *args, **kwargs)
        self.compactions.room.note_change(request.request_id)
        return freed

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.query_slots.release(request.request_id)
        self.planner.restart(request.request_id)
        self.compactions.room.note_change(request.request_id)

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        clipped = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        is_padded = num_computed_tokens + num_new_tokens > request.num_tokens
        if is_padded and request.status != RequestStatus.RUNNING:
            # The host has padded one last token with drafts that will all be rejected, and relies
            # on getting all of them: they keep the step's rows alike.
            return clipped
        return self.planner.clip_chunk(
            request.request_id,
            num_computed_tokens,
            clipped,
            request.num_tokens + request.num_output_placeholders,
            _num_unverified(request),
        )

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[Any, int, int, bool]:
        blocks, num_hit, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        limit = self.planner.max_cached_tokens(request.request_id)
        if limit is not None and num_hit > limit:
            num_hit = max(limit, 0) // self.block_size * self.block_size
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, num_hit)
        return blocks, num_hit, boundary, diverged

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """Take the worker's measurements along."""
        StepReport.of(model_runner_output).count_into(self.stats)
        if self.num_draft_tokens:
            self._observe_drafts(scheduler_output, model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Send our counts with vLLM's."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            post_counts(stats, self.stats)
        return stats

    # --- tests ----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError if requests, managers and pool contradict each other."""
        for manager in self._managers:
            manager.check_integrity()
            for request_id in manager.evicted:
                tracked = self.planner.requests[request_id]
                assert tracked.state not in (State.SKIPPED,), request_id
                group = manager.kv_cache_spec.layer_group
                assert group is not None, f"{request_id} has lost tokens of the draft model"
                lost = tracked.compacted_at - tracked.caches[group].num_tokens
                assert manager.evicted[request_id] == lost, (request_id, lost)
        assert self.planner.requests.keys() <= self.requests.keys()
        self.query_slots.check_integrity()


class CompressedScheduler(CompressionMixin, Scheduler):
    """For engines without async scheduling (vLLM's choice on CPU)."""


class CompressedAsyncScheduler(CompressionMixin, AsyncScheduler):
    """For engines with async scheduling."""

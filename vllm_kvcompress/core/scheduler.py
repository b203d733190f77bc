"""Overrides of vLLM's scheduler: when to ask the planner, take blocks, and tell the workers.

Every step: commit what the previous step compacted, let vLLM schedule, ask the planner which of the
scheduled requests are due, take blocks for them. Lengths are known beforehand, so nothing here
waits for the device and async scheduling cannot make anything stale.
"""

import time
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress.config.reading import CONFIG_KEY, parse_config
from vllm_kvcompress.core.admission import Admission
from vllm_kvcompress.core.block_manager import CompressedAttentionManager, register_manager
from vllm_kvcompress.core.compactions import Compactions
from vllm_kvcompress.core.draft.scheduling import DraftMixin
from vllm_kvcompress.core.host_groups import HostGroup
from vllm_kvcompress.core.longest import LongestSequence
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.pressure import Pressure
from vllm_kvcompress.core.query_slots import QuerySlots
from vllm_kvcompress.core.report import savings_line
from vllm_kvcompress.core.reuse import Reuse
from vllm_kvcompress.core.tracked_request import Phase, SkipReason
from vllm_kvcompress.host.part_checks import probed_layers
from vllm_kvcompress.lengths.decode_queries import ring_shape
from vllm_kvcompress.messages import ROOM_ATTRIBUTE, StepPlan, StepReport, post_counts
from vllm_kvcompress.metrics import CompressionStats
from vllm_kvcompress.plans import CompactionPlan
from vllm_kvcompress.spec import GroupMap

logger = init_logger(f"vllm.{__name__}")


def num_unverified(request: Request, num_own: int = 0) -> int:
    """Speculated tokens of earlier steps that count as computed and still await their verdict.

    With asynchronous scheduling one step is under way while the next is scheduled: a placeholder
    stands for the token it yields for certain, and one for each that it verifies. `num_own`
    placeholders of the step that is being scheduled do not count.
    """
    return max(request.num_output_placeholders - num_own - 1, 0)


class CompressionMixin(Scheduler):
    """Compression on top of any of vLLM's schedulers; comes first in the bases.

    Attributes
    ----------
    planner : Planner
        The phases of all requests.
    admission : Admission
        Judge of requests that arrive.
    compactions : Compactions
        Takes blocks for what is due.
    reuse : Reuse
        Caches that are kept for other requests.
    longest : LongestSequence
        Ends requests that the pool cannot hold.
    query_slots : QuerySlots
        Who may record queries while decoding.
    pressure : Pressure or None
        Whether memory is scarce; None where no setting waits for that.
    stats : CompressionStats
        Counts that have not yet been sent to the API server.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        register_manager()
        super().__init__(*args, **kwargs)
        self._managers = self._groups()
        group_map = GroupMap.of(manager.kv_cache_spec for manager in self._managers)
        config = parse_config(self.vllm_config.additional_config[CONFIG_KEY])
        assert config is not None, "the scheduler is installed only when compression is on"
        # Not every method's slots are in vLLM's number, or yet.
        ahead = max(self.num_lookahead_tokens, self.num_spec_tokens)
        self.planner = Planner(
            config=config,
            num_layer_groups=group_map.num_layer_groups,
            block_size=group_map.block_size,
            codes_per_row=group_map.codes_per_row,
            rations_queries=True,
            num_lookahead=ahead,
        )
        self.stats = CompressionStats()
        ring = ring_shape(self.vllm_config, config)
        self.query_slots = QuerySlots(self.planner, ring.num_slots, self.stats)
        probed_layers(self.vllm_config.model_config)  # now, so that no request waits for it
        self.admission = Admission(self.planner, self.vllm_config, self.max_model_len, self.stats)
        self.compactions = Compactions(
            self.planner,
            self._managers,
            group_map.layer_groups,
            self.kv_cache_manager.block_pool,
            self.max_model_len,
            self.stats,
        )
        room, pool = self.compactions.room, self.kv_cache_manager.block_pool
        setattr(self.kv_cache_manager, ROOM_ATTRIBUTE, room)
        places, reports = (self._managers, group_map.layer_groups), self.compactions.reports
        self.reuse = Reuse(self.planner, *places, room, reports, self.stats)
        self.longest = LongestSequence(room, pool.num_gpu_blocks - 1, self.max_model_len, ahead)
        self._too_long: list[str] = []
        kept_free = self.kv_cache_manager.watermark_blocks
        self.pressure = Pressure.of(config, self.planner, room, self.query_slots, kept_free)
        logger.info(savings_line(config, self.kv_cache_config, self.max_model_len))

    def _groups(self) -> list[CompressedAttentionManager | HostGroup]:
        ahead = self.vllm_config.max_concurrent_batches - 1
        return [
            each if isinstance(each, CompressedAttentionManager) else HostGroup(each, ahead)
            for each in self.kv_cache_manager.coordinator.single_type_managers
        ]

    # --- one step -------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Commit, schedule, plan. What the workers need travels with the output."""
        for name in self.compactions.take_misplanned():
            self._serve_uncompressed(name, "planning")
        self.compactions.commit()
        self.reuse.publish()
        for name in self.compactions.take_starved():
            self._start_over(name)
        if self.query_slots.owned:
            self.query_slots.release_idle(lambda name: self.requests[name].num_computed_tokens)
        if self.pressure is not None:
            self.pressure.update(self.running, num_unverified)
        output = super().schedule(throttle_prefills)
        # Before any of them can be compacted, which changes what its workers must know.
        setups = self.planner.setups_of([new.req_id for new in output.scheduled_new_reqs])
        for new in output.scheduled_new_reqs:
            self.reuse.note_started(self.requests[new.req_id])
            self.compactions.equal.note_started(self.requests[new.req_id])
        plans = self._plan(output)
        self.compactions.reports.note_planned(plan.request_id for plan in plans)
        StepPlan(
            setups=setups,
            plans=plans,
            query_slots=self.query_slots.take_changes(),
            views_given_up=self.compactions.take_given_up(),
        ).attach(output)
        return output

    def _start_over(self, request_id: str) -> None:
        """Preempt a request that must not go on uncompressed."""
        request = self.requests.get(request_id)
        if request is not None and request.status == RequestStatus.RUNNING:
            self.running.remove(request)
            self._preempt_request(request, time.monotonic())

    def _serve_uncompressed(self, request_id: str, reason: str) -> None:
        """What was done to a request's cache went wrong: start again without compression.

        It was planned by lengths alone, and the next step may be on its way to the workers: what
        that one says of the request is dropped, so nobody hears of a token that was computed from
        the cache. Where the whole prompt does not fit into the pool, it ends with an error.
        """
        self.stats.record_failure(reason)
        tracked = self.planner.requests.get(request_id)
        if tracked is None or tracked.phase is Phase.SKIPPED:
            return
        request = self.requests[request_id]
        self.stats.record_uncompressed(SkipReason.FAILED)
        self.reuse.give_up(request_id)
        self.compactions.equal.note_ended(request_id)
        if request.status == RequestStatus.RUNNING:
            self.running.remove(request)
            self._preempt_request(request, time.monotonic(), drop_stale_output=True)
        self.planner.give_up(request_id)
        fits = self.longest.bound(request)
        if not fits or request.num_output_tokens >= request.max_tokens:
            logger.error(
                "KV compression: request %s ends with an error: without compression the pool does "
                "not hold it.", request_id,
            )  # fmt: skip
            self._too_long.append(request_id)

    def _plan(self, output: SchedulerOutput) -> list[CompactionPlan]:
        """Hand out slots of the ring, and plan what is due; in most steps that is nothing."""
        requests, tracked_of = self.requests, self.planner.requests
        near: list[Request] = []
        for name in output.num_scheduled_tokens:
            tracked = tracked_of.get(name)
            if tracked is not None:
                request = requests[name]
                if not tracked.is_undisturbed(request.num_computed_tokens):
                    near.append(request)
        if not near:
            return []
        counts, ahead = output.num_scheduled_tokens, output.scheduled_spec_decode_tokens
        self.query_slots.provide(
            (each.request_id, (end := each.num_computed_tokens) - counts[each.request_id], end)
            for each in near
        )
        return self.compactions.plan(
            [each for each in near if self._is_due(each, len(ahead.get(each.request_id, ())))]
        )

    def _is_due(self, request: Request, num_ahead: int) -> bool:
        # The step's own output is among the placeholders by now, with what it verifies.
        unverified = num_ahead + num_unverified(request, 1 + num_ahead)
        num_certain = request.num_computed_tokens - unverified
        with self.compactions.guarded(request.request_id):
            return self.planner.note_progress(request.request_id, num_certain)
        return False

    # --- host overrides -------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Decide once, when the request arrives, whether it will be compressed."""
        is_new = request.request_id not in self.requests
        super().add_request(request)
        if not is_new:
            return  # the next chunk of a streaming session, which is never compressed
        self.admission.admit(request)
        self.reuse.prefixes.add(request)
        self.compactions.equal.add(request)
        if not self.longest.bound(request):
            self._too_long.append(request.request_id)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.query_slots.release(request.request_id)
        self.reuse.end(request, self.compactions.settle)
        tracked = self.planner.remove(request.request_id, request.num_computed_tokens)
        if tracked is not None and tracked.skip_reason is not None:
            self.stats.record_uncompressed(tracked.skip_reason)
        freed = super()._free_request(request, *args, **kwargs)
        self.compactions.equal.note_ended(request.request_id)
        self._forget(request.request_id)
        return freed

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.query_slots.release(request.request_id)
        self.planner.restart(request.request_id)
        self.compactions.equal.note_preempted(request.request_id)
        self._forget(request.request_id)

    def _forget(self, request_id: str) -> None:
        self.compactions.forget(request_id)
        self.reuse.kept.trim()

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        is_ready = super()._handle_blocked_waiting_request(request)
        if not is_ready or self.reuse.prefixes.must_wait(request):
            return False
        return not self.compactions.equal.must_wait(request)

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        clipped = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        tracked = self.planner.requests.get(request.request_id)
        if tracked is None or tracked.is_undisturbed(num_computed_tokens + clipped):
            return clipped
        is_padded = num_computed_tokens + num_new_tokens > request.num_tokens
        # Where the host has padded one last token of a request that waits with others that will all
        # be rejected, it relies on getting all of them: they keep the step's rows alike.
        if not is_padded or request.status == RequestStatus.RUNNING:
            clipped = self.planner.clip_chunk(
                request.request_id,
                num_computed_tokens,
                clipped,
                request.num_tokens + request.num_output_placeholders,
                num_unverified(request),
            )
            clipped = self.query_slots.clip(request.request_id, num_computed_tokens, clipped)
            if tracked.lacks_blocks_of_its_own and clipped > 1:
                clipped = self.compactions.room.clip(request, num_computed_tokens, clipped)
        reserve = self.compactions.room.reserve
        if reserve is None:
            return clipped
        certain = num_computed_tokens - num_unverified(request)
        return reserve.hold(request, certain, clipped, self.compactions.room.num_free)

    def _get_local_prefix_cache_hit(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[Any, int, int, bool]:
        found = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        blocks, num_hit, boundary, diverged = found
        if self.pressure is not None:
            self.pressure.start(request, blocks)
        limit = self.planner.max_cached_tokens(request.request_id)
        if limit is not None and num_hit > limit:
            # Not cut: a group of windowed layers has no blocks below the window of the longer hit.
            manager = self.kv_cache_manager
            hits, num_hit, num_uncached = manager.coordinator.find_longest_cache_hit(
                request.block_hashes, max(limit, 0)
            )
            blocks = manager.create_kv_cache_blocks(hits)
            boundary = num_hit + num_uncached if num_uncached else 0
        kept = self.reuse.find(request, num_hit)
        if kept is not None:
            return kept, kept.num_tokens, 0, False
        return blocks, num_hit, boundary, diverged

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Give back what is kept for others, too: weights may have changed."""
        self.reuse.kept.clear()
        self.compactions.equal.forget_copies()
        return super().reset_prefix_cache(*args, **kwargs)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """Take the worker's measurements along, and answer requests that never can be served."""
        report = StepReport.of(model_runner_output)
        report.count_into(self.stats)
        plans = StepPlan.of(scheduler_output).plans
        self.compactions.reports.note_reported(plan.request_id for plan in plans)
        for name, reason in report.failed.items():
            self._serve_uncompressed(name, reason)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if not self._too_long:
            return outputs
        too_long, self._too_long = self._too_long, []
        for request in self.finish_requests(too_long, RequestStatus.FINISHED_ERROR):
            reason = request.get_finished_reason()
            answer = EngineCoreOutput(request.request_id, [], finish_reason=reason)
            each = outputs.setdefault(request.client_index, EngineCoreOutputs())
            each.outputs.append(answer)
        return outputs

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
            for request_id, evicted in manager.evicted.items():
                tracked = self.planner.requests[request_id]
                assert tracked.phase is not Phase.SKIPPED, request_id
                group, held = manager.kv_cache_spec.layer_group, tracked.compaction
                assert group is not None, f"{request_id} has lost tokens of the draft model"
                lost = held.compacted_at - held.caches[group].num_tokens
                assert evicted == lost, (request_id, evicted, lost)
        assert self.planner.requests.keys() <= self.requests.keys()
        self.query_slots.check_integrity()
        self.reuse.check_integrity()
        self.compactions.equal.check_integrity()
        room = self.compactions.room
        assert room.num_free >= room.num_set_aside(), "blocks that are set aside are taken"


class CompressedScheduler(DraftMixin, CompressionMixin, Scheduler):
    """For engines without async scheduling (vLLM's choice on CPU)."""


class CompressedAsyncScheduler(DraftMixin, CompressionMixin, AsyncScheduler):
    """For engines with async scheduling."""

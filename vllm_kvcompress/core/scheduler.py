"""Scheduler that plans compactions beside vLLM's own scheduling.

Every step: commit what the previous step compacted, let vLLM schedule, then plan compactions for
the requests whose prompt, or interval of generated tokens, ends in this step. Lengths are known
beforehand, so nothing here waits for the device and async scheduling cannot make anything stale.
"""

import zlib
from array import array
from collections.abc import Iterable
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from vllm_kvcompress.budgets import forced_ranges
from vllm_kvcompress.config import CONFIG_KEY, parse_config
from vllm_kvcompress.core.block_manager import CompressedAttentionManager, register_manager
from vllm_kvcompress.core.planner import Planner, State, TrackedRequest
from vllm_kvcompress.core.report import savings_line
from vllm_kvcompress.core.task import RequestClassifier
from vllm_kvcompress.metrics import STATS_KEY, CompressionStats
from vllm_kvcompress.plans import CompactionPlan, GroupLengths, GroupPlan
from vllm_kvcompress.request_options import choose_task, parse_request
from vllm_kvcompress.settings import CompressionConfig
from vllm_kvcompress.spec import GroupMap

logger = init_logger(f"vllm.{__name__}")


def prompt_checksum(request: Request) -> int:
    """Checksum of the prompt's tokens; 0 where the prompt came as embeddings."""
    return zlib.crc32(array("q", request.prompt_token_ids or ()).tobytes())


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
    stats : CompressionStats
        Counts that have not yet been sent to the API server.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        register_manager()
        super().__init__(*args, **kwargs)
        self._managers = self._own_managers()
        group_map = GroupMap.of(manager.kv_cache_spec for manager in self._managers)
        self._layer_group_of = group_map.layer_groups
        self.compression_config = self._read_config()
        self.planner = Planner(
            config=self.compression_config,
            num_layer_groups=group_map.num_layer_groups,
            block_size=group_map.block_size,
            codes_per_row=group_map.codes_per_row,
        )
        self.stats = CompressionStats()
        self._classifier = RequestClassifier(self.vllm_config.model_config)
        self._planned: list[str] = []
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
        """Commit, schedule, plan. Plans travel as an attribute of the output."""
        self._commit_compactions()
        output = super().schedule(throttle_prefills)
        plans = [
            plan
            for request_id in output.num_scheduled_tokens
            for plan in self._plan_compaction(
                self.requests[request_id],
                len(output.scheduled_spec_decode_tokens.get(request_id, ())),
            )
        ]
        if plans:
            output.kv_compression_plans = plans  # type: ignore[attr-defined]
        tasks = {
            new.req_id: tracked.task
            for new in output.scheduled_new_reqs
            if (tracked := self.planner.requests[new.req_id]).task is not None
        }
        if self.num_draft_tokens:
            steps = [self.planner.num_draft_steps(each) for each in output.num_scheduled_tokens]
            output.kv_draft_steps = max(steps, default=0)  # type: ignore[attr-defined]
        if tasks:
            output.kv_compression_tasks = tasks  # type: ignore[attr-defined]
        return output

    def _plan_compaction(self, request: Request, num_drafts: int) -> list[CompactionPlan]:
        """What the step does to a request's cache: evict, take a view, or both from one region."""
        request_id = request.request_id
        # The step's own output is among the placeholders by now, with what it verifies.
        unverified = num_drafts + _num_unverified(request, 1 + num_drafts)
        if not self.planner.note_progress(request_id, request.num_computed_tokens - unverified):
            return []
        tracked = self.planner.requests[request_id]
        assert tracked.config is not None
        is_draft = tracked.config.mode == "draft"
        wanted = [(tracked.lengths, is_draft)]
        if any(tracked.view_lengths):
            wanted.append((tracked.view_lengths, True))
        is_linked = is_draft and self.planner.links_blocks(tracked)
        num_free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        if len(wanted) > 1 and sum(self._num_needed(each) for each, _ in wanted) > num_free:
            # An eviction gives memory back and must not wait for a view, which takes some.
            wanted.pop()
            tracked.view_lengths = []
        if not is_linked and self._num_needed(wanted[0][0]) > num_free:
            self.stats.deferrals += 1
            return []
        tracked.state = State.PLANNED
        if len(wanted) > 1 or is_draft:
            self.planner.start_view(tracked)
        self._planned.append(request_id)
        return [
            self._make_plan(request, tracked, lengths, is_view, is_linked)
            for lengths, is_view in wanted
        ]

    def _num_needed(self, lengths: list[GroupLengths | None]) -> int:
        """Destination blocks of all KV cache groups."""
        found = [lengths[group] for group in self._layer_group_of if group is not None]
        return sum(each.kept_len // self.planner.block_size for each in found if each)

    def _make_plan(
        self,
        request: Request,
        tracked: TrackedRequest,
        lengths: list[GroupLengths | None],
        is_view: bool,
        is_linked: bool,
    ) -> CompactionPlan:
        assert tracked.config is not None
        caches, window = self.planner.current_caches(tracked), tracked.config.observation_window
        groups: list[GroupPlan | None] = []
        for manager, number in zip(self._managers, self._layer_group_of, strict=True):
            each = None if number is None else lengths[number]
            if number is None or each is None:
                groups.append(None)
                continue
            cache = caches[number]
            what = (request.request_id, each, cache, forced_ranges(cache, window))
            groups.append(manager.link(*what) if is_linked else manager.plan(*what, is_view))
        return CompactionPlan(
            request_id=request.request_id,
            position=tracked.position,
            while_decoding=tracked.position > tracked.prompt_len,
            seed=prompt_checksum(request),
            groups=tuple(groups),
            is_view=is_view,
            is_linked=is_linked,
        )

    def _commit_compactions(self) -> None:
        planned, self._planned = self._planned, []
        pool = self.kv_cache_manager.block_pool
        for request_id in planned:
            tracked = self.planner.requests.get(request_id)
            if tracked is None or tracked.state is not State.PLANNED:
                continue  # finished, aborted or preempted since; its blocks are free already
            if tracked.config is not None and tracked.config.mode == "draft":
                self._commit_view(request_id, tracked, tracked.lengths)
                self.planner.commit_view(tracked)
                continue
            if any(tracked.view_lengths):
                self._commit_view(request_id, tracked, tracked.view_lengths)
            before = pool.get_num_free_blocks()
            for manager in self._managers:
                manager.commit(request_id)
            self._record(tracked, pool.get_num_free_blocks() - before)
            self.planner.commit(tracked)

    def _commit_view(
        self, request_id: str, tracked: TrackedRequest, lengths: list[GroupLengths | None]
    ) -> None:
        for manager in self._managers:
            manager.commit_view(request_id)
        lost = [each.evicted if each else 0 for each in lengths]
        held = tracked.position - sum(lost) // len(lost)
        is_first = tracked.position == tracked.prompt_len
        self.stats.record_view(tracked.policy, held, "prompt" if is_first else "refresh")

    def _record(self, tracked: TrackedRequest, num_returned: int) -> None:
        taken = self._num_needed(tracked.lengths)
        freed = sum(each.evicted for each in tracked.lengths if each)
        held = sum(cache.num_tokens for cache in self.planner.current_caches(tracked))
        self.stats.record_compaction(
            tracked.policy,
            "decode" if tracked.while_decoding else "prompt",
            [each.tokens_evicted if each else 0 for each in tracked.lengths],
            kept_ratio=(held - freed) / (len(tracked.lengths) * tracked.position),
            blocks_freed=num_returned - taken,
            first=not tracked.counted,
        )
        tracked.counted = True

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
            sampled = results.sampled_token_ids[results.req_id_to_index[request_id]]
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
        params = request.sampling_params
        options = parse_request(params.extra_args if params else None)
        task, decided_by = choose_task(
            self.compression_config, options, lambda: self._classifier.classify(request)
        )
        if task is not None and decided_by is not None:
            self.stats.record_task(task, decided_by)
        tracked = self.planner.add(
            request.request_id, request.num_prompt_tokens, options, bool(request.resumable), task
        )
        if tracked.skip_reason is not None:
            self.stats.record_uncompressed(tracked.skip_reason)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        tracked = self.planner.remove(request.request_id)
        if tracked is not None and tracked.skip_reason is not None:
            self.stats.record_uncompressed(tracked.skip_reason)
        return super()._free_request(request, *args, **kwargs)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.planner.restart(request.request_id)

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        clipped = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
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
        """Take the worker's timings along."""
        self.stats.seconds += getattr(model_runner_output, "kv_compression_seconds", ())
        self.stats.record_codebooks(getattr(model_runner_output, "kv_codebook_measures", ()))
        if self.num_draft_tokens:
            self._observe_drafts(scheduler_output, model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Send our counts with vLLM's. The KV connectors' field is free: they are refused."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and (snapshot := self.stats.snapshot()):
            stats.kv_connector_stats = {STATS_KEY: snapshot}
            self.stats = CompressionStats()
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


class CompressedScheduler(CompressionMixin, Scheduler):
    """For engines without async scheduling (vLLM's choice on CPU)."""


class CompressedAsyncScheduler(CompressionMixin, AsyncScheduler):
    """For engines with async scheduling."""

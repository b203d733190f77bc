"""Takes blocks for what a step does to its requests' caches, and commits it one step later.

What is due, and how large, is the planner's decision; here is where it meets the pool.
"""

import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from vllm.logger import init_logger
from vllm.v1.request import Request

from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.core.equal_prompts import EqualPrompts
from vllm_kvcompress.core.host_groups import HostGroup
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.reports import Reports
from vllm_kvcompress.core.reserve import Reserve
from vllm_kvcompress.core.room import Room
from vllm_kvcompress.core.tracked_request import TrackedRequest
from vllm_kvcompress.lengths.budgets import forced_ranges
from vllm_kvcompress.metrics import CompressionStats
from vllm_kvcompress.plans import CompactionPlan, GroupLengths, GroupPlan, Purpose

logger = init_logger(f"vllm.{__name__}")

Lengths = Sequence[GroupLengths | None]


def prompt_checksum(request: Request, prompt_len: int) -> int:
    """Checksum of the prompt's first tokens; 0 where the prompt came as embeddings."""
    return zlib.crc32(array("q", (request.prompt_token_ids or ())[:prompt_len]).tobytes())


class Compactions:
    """Evictions and views under way.

    Parameters
    ----------
    planner : Planner
        States of all requests.
    managers : sequence of (CompressedAttentionManager or HostGroup)
        One per KV cache group.
    layer_group_of : sequence of (int or None)
        Layer group of every KV cache group; None for one that is never compacted.
    pool : BlockPool
        vLLM's.
    max_model_len : int
        Tokens of the longest sequence.
    stats : CompressionStats
        Where to count.

    Attributes
    ----------
    room : Room
        The pool, and who gives way.
    reports : Reports
        Which compactions the workers have reported on.
    equal : EqualPrompts
        Who reads what another request's compaction has kept.
    """

    def __init__(
        self,
        planner: Planner,
        managers: Sequence[CompressedAttentionManager | HostGroup],
        layer_group_of: Sequence[int | None],
        pool: Any,
        max_model_len: int,
        stats: CompressionStats,
    ) -> None:
        self.planner, self.managers, self.layer_group_of = planner, managers, layer_group_of
        self.pool, self.max_model_len, self.stats = pool, max_model_len, stats
        self.room = room = Room(managers, layer_group_of, pool, max_model_len, self._give_up_view)
        self.reports = Reports()
        places = managers, layer_group_of
        self.equal = EqualPrompts(planner, *places, pool, self.reports, room.note_change)
        if planner.config.shared_blocks == "always":
            waiting, will_read = room.waiting_blocks, self.equal.will_read
            room.reserve = Reserve(planner, *places, max_model_len, waiting, will_read)
        for manager, number in zip(managers, layer_group_of, strict=True):
            if number is not None and isinstance(manager, CompressedAttentionManager):
                manager.most_held = partial(planner.most_held, number)
        self._planned: dict[str, int] = {}  # and blocks of their own that are overwritten
        self._given_up: list[str] = []
        self._starved: list[str] = []
        self._misplanned: list[str] = []

    # --- plan -----------------------------------------------------------------------------

    def plan(self, due: Sequence[Request]) -> list[CompactionPlan]:
        """Plans of a step for the requests of it that are due."""
        tracked = {each.request_id: self.planner.requests[each.request_id] for each in due}
        found = {name: each.compaction.lengths for name, each in tracked.items()}
        evictions = {name: lengths for name, lengths in found.items() if any(lengths)}
        worthwhile = {
            name
            for name in evictions
            if self._is_certain(tracked[name]) or self._adopts(name, tracked[name])
        }
        others = {name: evictions[name] for name in evictions.keys() - worthwhile}
        worthwhile |= self.room.worthwhile(others)
        plans: list[CompactionPlan] = []
        for request in due:
            name, each = request.request_id, tracked[request.request_id]
            if name in evictions and name not in worthwhile:
                self.room.free_for(name, evictions[name])
                self.planner.decline(each)
            else:
                with self.guarded(name):
                    plans += self._plan_one(request, each)
        return plans

    @contextmanager
    def guarded(self, request_id: str) -> Iterator[None]:
        """Plan something for a request: what is raised is noted for it, and goes no further."""
        try:
            yield
        except Exception as error:  # the engine's loop ends with whatever is raised here
            logger.exception(
                "KV compression: nothing could be planned for request %s (%s); it starts again "
                "without compression.", request_id, type(error).__name__,
            )  # fmt: skip
            self._misplanned.append(request_id)

    def _is_certain(self, tracked: TrackedRequest) -> bool:
        """Whether what is evicted of a request is evicted at its mark, whether it pays or not."""
        return self.room.reserve is not None or tracked.shared_len is not None

    def _adopts(self, request_id: str, tracked: TrackedRequest) -> bool:
        """Whether a request takes what an equal one has kept: no blocks, and no work."""
        return tracked.position == tracked.prompt_len and self.equal.reads(request_id)

    def _plan_one(self, request: Request, tracked: TrackedRequest) -> list[CompactionPlan]:
        """Take blocks for all of a request's work; nothing where there is no room."""
        work = tracked.work
        if self._adopts(request.request_id, tracked):
            return self._adopt(request, tracked)
        needed = sum(self.room.num_needed(lengths) for _, lengths in work)
        aside = self.room.num_set_aside(request.request_id)
        if len(work) > 1 and needed + aside > self.room.num_free:
            # An eviction gives memory back and must not wait for a view, which takes some.
            self.planner.drop_view(tracked)
            work.pop()
        own: list[int] | None = [0] * len(self.managers)
        if work[0][0] is Purpose.EVICT:
            own = self.room.own_destinations(request.request_id, work[0][1])
        elif not self._has_room_for_view(request, *work[0]):
            own = None
        if own is None:
            self.stats.deferrals += 1
            self.planner.put_off(tracked)
            if work[0][0] is Purpose.EVICT and self._is_certain(tracked):
                self.room.free_for(request.request_id, work[0][1])
                self._starved.append(request.request_id)
            return []
        self.planner.note_planned(tracked)
        if self.room.reserve is not None:
            self.room.reserve.note_change()
        self._planned[request.request_id] = sum(own)
        return [self._make_plan(request, tracked, *each, own) for each in work]

    def _adopt(self, request: Request, tracked: TrackedRequest) -> list[CompactionPlan]:
        lengths = tracked.compaction.lengths
        self.planner.note_planned(tracked)
        self.room.note_change()
        self._planned[request.request_id] = self.room.num_needed(lengths)  # none is taken
        none = [0] * len(self.managers)
        return [self._make_plan(request, tracked, Purpose.ADOPT, lengths, none)]

    def _has_room_for_view(self, request: Request, purpose: Purpose, lengths: Lengths) -> bool:
        """Whether there are blocks for a view that is taken alone."""
        num_needed = self.room.num_needed(lengths)
        if purpose is Purpose.LINKED_VIEW:
            return True  # of blocks that are there
        if request.num_preemptions:
            # The pool was too small once: a view must not be what makes it so again.
            end = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
            num_needed += self.room.num_growth(request.request_id, end)
        return num_needed + self.room.num_set_aside() <= self.room.num_free

    def _make_plan(
        self,
        request: Request,
        tracked: TrackedRequest,
        purpose: Purpose,
        lengths: Lengths,
        own: Sequence[int],
    ) -> CompactionPlan:
        assert tracked.config is not None
        window = tracked.config.observation_window
        caches = tracked.compaction.caches_at(tracked.position)
        groups: list[GroupPlan | None] = []
        for manager, number, num_own in zip(self.managers, self.layer_group_of, own, strict=True):
            each = None if number is None else lengths[number]
            if number is None or each is None:
                groups.append(None)
                continue
            assert isinstance(manager, CompressedAttentionManager)
            cache = caches[number]
            what = (request.request_id, each, cache, forced_ranges(cache, window))
            groups.append(manager.plan(purpose, *what, num_own))
        return CompactionPlan(
            request_id=request.request_id,
            position=tracked.position,
            while_decoding=tracked.position > tracked.prompt_len,
            seed=prompt_checksum(request, tracked.prompt_len),
            groups=tuple(groups),
            purpose=purpose,
        )

    def take_misplanned(self) -> list[str]:
        """Requests whose plans went wrong: some of their blocks may be taken, and never filled."""
        misplanned, self._misplanned = self._misplanned, []
        return misplanned

    def take_starved(self) -> list[str]:
        """Requests whose compaction found no blocks although it must happen at its mark.

        What is set aside is meant to leave none.
        """
        starved, self._starved = self._starved, []
        return starved

    def is_planned(self, request_id: str) -> bool:
        """Whether the last step plans something for a request that is not committed yet."""
        return request_id in self._planned

    # --- commit ---------------------------------------------------------------------------

    def commit(self) -> None:
        """Swap the blocks of what the previous step compacted, and free the old ones."""
        planned, self._planned = self._planned, {}
        for request_id, num_own in planned.items():
            tracked = self.planner.planned(request_id)
            if tracked is not None:  # else its blocks are free already
                self._commit_one(request_id, tracked, num_own)
        self.equal.publish()
        if self.room.reserve is not None:
            self.room.reserve.begin_step()

    def _commit_one(self, request_id: str, tracked: TrackedRequest, num_own: int) -> None:
        for purpose, lengths in reversed(tracked.work):
            if purpose.is_view:
                self._commit_view(request_id, tracked, lengths)
            else:
                self._commit_eviction(request_id, tracked, lengths, num_own)
        self.planner.commit(tracked)

    def settle(self, request_id: str, num_tokens: int) -> bool:
        """Commit at once what the last step compacted of a request that ends.

        False, and nothing is done, if that were more than its first `num_tokens` tokens. The step
        is on its way to the device, or through: what `commit` relies on.
        """
        tracked = self.planner.planned(request_id)
        if tracked is None:
            return True
        if tracked.position > num_tokens:
            return False
        self._commit_one(request_id, tracked, self._planned.pop(request_id))
        return True

    def _commit_view(self, request_id: str, tracked: TrackedRequest, lengths: Lengths) -> None:
        for manager in self.managers:
            manager.commit_view(request_id)
        lost = [each.evicted if each else 0 for each in lengths]
        held = tracked.position - sum(lost) // len(lost)
        is_first = tracked.position == tracked.prompt_len
        self.stats.record_view(tracked.policy, held, "prompt" if is_first else "refresh")

    def _commit_eviction(
        self, request_id: str, tracked: TrackedRequest, lengths: Lengths, num_own: int
    ) -> None:
        before = self.room.num_free
        for manager in self.managers:
            manager.commit(request_id)
            # Layers that kept everything read what layers below computed, too.
            manager.mark_lossy(request_id)
        self.room.note_change()
        evicted = sum(each.evicted for each in lengths if each)
        held = sum(cache.num_tokens for cache in tracked.compaction.caches_at(tracked.position))
        self.stats.record_compaction(
            tracked.policy,
            "decode" if tracked.while_decoding else "prompt",
            [each.tokens_evicted if each else 0 for each in lengths],
            kept_ratio=(held - evicted) / (len(lengths) * tracked.position),
            blocks_taken=self.room.num_needed(lengths) - num_own,
            blocks_returned=self.room.num_free - before,
            first=not tracked.counted,
        )

    def forget(self, request_id: str) -> None:
        """The request has lost its blocks: it ended or was preempted."""
        for manager in self.managers:
            manager.forget(request_id)
        self.room.note_change(request_id)

    # --- views ----------------------------------------------------------------------------

    def _give_up_view(self) -> bool:
        """Give back the view that was taken last; False if there is none."""
        for name, tracked in self.planner.idle_views():
            if sum(manager.give_up_view(name) for manager in self.managers):
                self._note_given_up(name)
                self.stats.record_view_given_up(tracked.policy)
                return True
        return False

    def end_view(self, request_id: str) -> None:
        """Give back the view of a request that will draft no more, and that no step takes."""
        for manager in self.managers:
            manager.give_up_view(request_id)
        self._note_given_up(request_id)
        self.room.note_change()

    def _note_given_up(self, request_id: str) -> None:
        self.planner.give_up_view(request_id)
        self._given_up.append(request_id)

    def take_given_up(self) -> tuple[str, ...]:
        """Requests whose views were given up since the last call."""
        given_up, self._given_up = self._given_up, []
        return tuple(given_up)

"""When memory is scarce, and whose cache is compressed then.

Before every step the pool is measured: blocks that requests hold, as a share of all. From the high
mark on memory is scarce, and likewise in the step behind one in which a request did not get its
blocks: a waiting one was not admitted, or a running one preempted another. It stays scarce until
the low mark is reached. Meanwhile

* a request that starts is compacted at the end of its prompt, as is at any time one whose prompt
  alone would bring the pool to the high mark;
* of the running requests behind their prompts those that give most blocks back are chosen, until
  no more than the low mark would be held, nor so much that the refused request could not be
  admitted. What a chosen one gives back counts as gone from then on.

A chosen request is compacted in this step, or as soon as the queries are recorded that its policy
reads. Only as many are chosen as find a slot for these, so that none of them waits. All of this
follows from the schedule, so ranks cannot disagree and a run can be repeated.
"""

from collections.abc import Callable, Sequence
from typing import Any

from vllm_kvcompress.config.pressure import PressureConfig
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.query_slots import QuerySlots
from vllm_kvcompress.core.resting import Resting
from vllm_kvcompress.core.room import Room
from vllm_kvcompress.core.tracked_request import TrackedRequest


class Pressure:
    """High and low mark of the pool.

    Parameters
    ----------
    marks : PressureConfig
        The server's.
    planner : Planner
        States of all requests.
    room : Room
        The pool.
    slots : QuerySlots
        Who may record queries while decoding.
    num_kept_free : int
        Blocks that vLLM keeps free beside those that a waiting request asks for (its watermark).

    Attributes
    ----------
    is_on : bool
        Whether memory is scarce in the step that is being scheduled.
    """

    def __init__(
        self,
        marks: PressureConfig,
        planner: Planner,
        room: Room,
        slots: QuerySlots,
        num_kept_free: int,
    ) -> None:
        self._resting, self._room, self._slots = Resting(planner), room, slots
        self._num_kept_free = num_kept_free
        self._high = marks.when * room.num_usable
        self._low = int(marks.until * room.num_usable)
        self.is_on = False
        self._chosen: dict[str, int] = {}  # and blocks that they will give back

    @classmethod
    def of(
        cls,
        config: CompressionConfig,
        planner: Planner,
        room: Room,
        slots: QuerySlots,
        num_kept_free: int,
    ) -> "Pressure | None":
        """What the server's setting needs, or one of its tasks'."""
        settings = config.by_task.values() or (config,)
        if not any(each.waits_for_pressure for each in settings):
            return None
        return cls(config.pressure, planner, room, slots, num_kept_free)

    def start(self, request: Any, hits: Any) -> None:
        """A request starts, or tries to, with `hits` (KVCacheBlocks) in the prefix cache.

        If all of it brings the pool to the high mark, that counts as if it had been reached: who
        makes memory scarce gives blocks back at once, while others have to record queries first.
        """
        num_new = self._room.num_growth(request.request_id, request.num_tokens)
        num_new -= sum(block.ref_cnt > 0 for group in hits.blocks for block in group)
        is_scarce = self.is_on or self._room.num_held + num_new >= self._high
        self._resting.start(request.request_id, is_scarce)

    def update(self, running: Sequence[Any], num_unverified: Callable[[Any], int]) -> None:
        """Measure the pool, and choose whose cache is compressed.

        Parameters
        ----------
        running : sequence of Request
            Requests that have blocks.
        num_unverified : callable
            Of a request's computed tokens, those that may come to nothing.
        """
        num_held, num_lacking = self._room.num_held, self._room.num_lacking
        self._room.num_lacking = 0
        if num_lacking or num_held >= self._high:
            self.is_on = True
        elif num_held <= self._low:
            self.is_on = False
        if not self.is_on:
            for name in self._chosen:
                self._resting.let_rest(name)
            self._chosen = {}
            return
        self._chosen = {
            name: gain for name, gain in self._chosen.items() if self._resting.is_chosen(name)
        }
        goal = self._low
        if num_lacking:
            goal = min(goal, self._room.num_usable - num_lacking - self._num_kept_free)
        num_spare = num_held - sum(self._chosen.values()) - goal
        if num_spare > 0:
            self._choose(num_spare, running, num_unverified)

    def _choose(
        self, num_spare: int, running: Sequence[Any], num_unverified: Callable[[Any], int]
    ) -> None:
        """Choose requests that give so many blocks back, or all that give any."""
        num_slots = self._slots.num_free
        num_slots -= sum(name not in self._slots.owned for name in self._chosen)
        found: dict[str, tuple[Any, TrackedRequest]] = {}
        for request in running:
            num_certain = request.num_computed_tokens - num_unverified(request)
            tracked = self._resting.candidate(request.request_id, num_certain)
            if tracked is None or (tracked.query_window and num_slots <= 0):
                continue
            if self._resting.size(tracked, num_certain):
                found[request.request_id] = request, tracked
        if not found:
            return
        alone, together = self._room.gains(
            {name: tracked.compaction.lengths for name, (_, tracked) in found.items()}
        )
        worthwhile = [(gain, [name]) for name, gain in alone.items()]
        for family, gain in together.items():
            worthwhile.append((gain, [name for name in found if name in family]))
        # Who runs longest comes first of those that give as much.
        for gain, names in sorted(worthwhile, key=lambda each: -each[0]):
            num_needed = sum(found[name][1].query_window > 0 for name in names)
            if num_spare > 0 and num_needed <= num_slots:
                num_spare, num_slots = num_spare - gain, num_slots - num_needed
                for name in names:
                    request, tracked = found[name]
                    self._resting.choose(tracked, request.num_computed_tokens)
                    self._chosen[name] = gain if name == names[0] else 0
        for name in found.keys() - {name for _, names in worthwhile for name in names}:
            self._resting.pass_over(found[name][1])

"""Who may record queries while decoding.

A compaction while decoding reads the queries of the last `window` tokens before it, and nothing
else of them is needed. So a request gets a slot of the workers' ring in the step that computes the
first of these tokens, and gives it back once its compaction is committed. Where no slot is free it
goes on uncompacted: it gets one when its turn comes, and is compacted when a whole window has been
recorded. All of this follows from lengths alone, and the workers are told which slot is
whose: ranks cannot disagree.
"""

import heapq
from collections.abc import Callable, Iterable
from operator import itemgetter

from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.metrics import CompressionStats


class QuerySlots:
    """Slots of the ring.

    Parameters
    ----------
    planner : Planner
        States of all requests.
    num_slots : int
        Slots there are.
    stats : CompressionStats
        Where to count steps in which a due compaction had no queries.
    """

    def __init__(self, planner: Planner, num_slots: int, stats: CompressionStats) -> None:
        self.planner, self.stats = planner, stats
        self.owned: dict[str, int] = {}
        self._num_slots = num_slots
        self._free = list(range(num_slots))
        self._changes: dict[str, int] = {}

    def release_idle(self, num_computed: Callable[[str], int]) -> None:
        """Take back slots of requests whose next window has not begun; before a step is scheduled.

        `num_computed` tells how many tokens of a request are computed.
        """
        for request_id in list(self.owned):
            first = self.planner.queries_from(request_id)
            if first is None or first > num_computed(request_id):
                self.release(request_id)
                self._changes[request_id] = -1

    def provide(self, step: Iterable[tuple[str, int, int]]) -> None:
        """Hand out slots to requests of a step that computes tokens of their windows.

        Whoever has waited for most tokens comes first, so that nobody waits for ever.

        Parameters
        ----------
        step : iterable of (str, int, int)
            Requests and the tokens [start, end) that the step computes of each, or earlier ones
            where drafts were rejected.
        """
        if not self._num_slots:
            return
        wanting = []
        for request_id, start, end in step:
            first = self.planner.queries_from(request_id)
            if first is not None and end > first and request_id not in self.owned:
                wanting.append((first - end, request_id, start, end))
        for _, request_id, start, end in sorted(wanting, key=itemgetter(0)):
            if self._free:
                self.owned[request_id] = self._changes[request_id] = heapq.heappop(self._free)
                self.planner.note_recording(request_id, start)
            elif self.planner.is_overdue(request_id, end):
                self.stats.deferrals += 1

    def release(self, request_id: str) -> None:
        """Take back the slot of a request that starts over, or is gone."""
        slot = self.owned.pop(request_id, None)
        if slot is not None:
            heapq.heappush(self._free, slot)
            self._changes.pop(request_id, None)
            self.planner.note_recording(request_id, None)

    def take_changes(self) -> dict[str, int]:
        """Slots handed out since the last call, -1 for those taken back, by request."""
        changes, self._changes = self._changes, {}
        return changes

    def check_integrity(self) -> None:
        """Raise AssertionError if a slot is lost, or has two owners, or one that is gone."""
        slots = [*self.owned.values(), *self._free]
        assert sorted(slots) == list(range(self._num_slots)), slots
        assert self.owned.keys() <= self.planner.requests.keys()

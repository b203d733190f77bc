"""Who may record queries while decoding.

A compaction while decoding reads the queries of the last `window` tokens before it, and nothing
else of them is needed. So a request gets a slot of the workers' ring in the step that computes the
first of these tokens, and gives it back once its compaction is committed. Where no slot is free the
request waits before these tokens, so that it is compacted where it would be on an idle server;
those that have slots go on, and give them back. Views that are taken again are no reason to wait:
drafts read them, and tokens do not depend on them.

All of this follows from lengths alone, and the workers are told which slot is whose: ranks cannot
disagree.
"""

import heapq
from collections.abc import Callable, Iterable
from itertools import islice
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
        Where to count requests that wait, once a step.
    """

    def __init__(self, planner: Planner, num_slots: int, stats: CompressionStats) -> None:
        self.planner, self.stats = planner, stats
        self.owned: dict[str, int] = {}
        self._num_slots = num_slots
        self._free = list(range(num_slots))
        self._waiting: dict[str, None] = {}  # who has waited longest comes first
        self._changes: dict[str, int] = {}

    @property
    def num_free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    def release_idle(self, num_computed: Callable[[str], int]) -> None:
        """Take back slots of requests whose next window has not begun; before a step is scheduled.

        `num_computed` tells how many tokens of a request are computed.
        """
        for request_id in list(self.owned):
            first = self.planner.queries_from(request_id)
            # One window may follow another: then others come first, or they would wait for ever.
            if first is None or first >= num_computed(request_id):
                self.release(request_id)
                self._changes[request_id] = -1

    def clip(self, request_id: str, num_computed: int, num_new: int) -> int:
        """Tokens of a step that a request may compute of `num_new`, and a slot if it needs one.

        Slots that come free go to those that have waited longest.
        """
        first = self.planner.queries_from(request_id)
        if not self._num_slots or first is None or request_id in self.owned:
            return num_new
        if num_computed + num_new <= first or not self.planner.must_record(request_id):
            return num_new
        self._waiting.setdefault(request_id)
        if request_id in islice(self._waiting, len(self._free)):
            self._hand_out(request_id, num_computed)
            return num_new
        allowed = max(first - num_computed, 0)
        self.stats.deferrals += not allowed
        return allowed

    def _hand_out(self, request_id: str, start: int) -> None:
        self._waiting.pop(request_id, None)
        self.owned[request_id] = self._changes[request_id] = heapq.heappop(self._free)
        self.planner.note_recording(request_id, start)

    def provide(self, step: Iterable[tuple[str, int, int]]) -> None:
        """Hand out slots that are left to requests of a step whose views may be taken again.

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
                wanting.append((first - end, request_id, start))
        for _, request_id, start in sorted(wanting, key=itemgetter(0)):
            if self._free:
                self._hand_out(request_id, start)

    def release(self, request_id: str) -> None:
        """Take back the slot of a request that starts over, or is gone."""
        self._waiting.pop(request_id, None)
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
        assert self._waiting.keys() <= self.planner.requests.keys() - self.owned.keys()

"""Requests whose setting waits for memory to be scarce: they rest, and are chosen.

    RESTING --(memory is scarce when it starts)--> ARMED at the end of its prompt
       ^ |
       | '--(chosen, behind its prompt)--> ARMED once its queries are recorded --.
       '---- compacted, or there is memory again, or it would give nothing ------'

A request that rests is stock vLLM's in every respect: it takes whole prefix-cache hits, its steps
are clipped nowhere and nobody records its queries. `next_at` is the length from which on it may be
chosen: the end of its prompt, or `interval` tokens behind it where that is shorter than
`min_prompt_len`, and `interval` tokens behind its last compaction.
"""

from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.tracked_request import Phase, TrackedRequest


class Resting:
    """The planner's part for such requests.

    Parameters
    ----------
    planner : Planner
        States of all requests.
    """

    def __init__(self, planner: Planner) -> None:
        self._planner = planner

    def start(self, request_id: str, is_memory_scarce: bool) -> None:
        """Decide whether the end of its prompt compacts a request that is about to start."""
        tracked = self._planner.requests.get(request_id)
        if tracked and tracked.waits_for_pressure and tracked.phase is not Phase.SKIPPED:
            assert tracked.config is not None
            self._planner.arm(tracked, tracked.config, is_memory_scarce)

    def candidate(self, request_id: str, num_certain: int) -> TrackedRequest | None:
        """The request, if it rests and may be chosen at a length of so many tokens."""
        tracked = self._planner.requests.get(request_id)
        if tracked is None or tracked.phase is not Phase.RESTING or num_certain < tracked.next_at:
            return None
        return tracked

    def size(self, tracked: TrackedRequest, num_certain: int) -> bool:
        """Size a compaction of a candidate; if it would evict nothing, let it rest for longer."""
        self._planner.fit(tracked, num_certain)
        tracked.was_under_budget = not tracked.work
        if tracked.was_under_budget:
            self._planner.rearm(tracked)
        return not tracked.was_under_budget

    def pass_over(self, tracked: TrackedRequest) -> None:
        """Let a candidate rest for longer: others hold its blocks, so it would give nothing."""
        self._planner.decline(tracked)

    def choose(self, tracked: TrackedRequest, num_computed: int) -> None:
        """Compact it once the queries that its policy reads are recorded: the next ones."""
        tracked.next_at = num_computed + max(tracked.query_window, 1)
        tracked.phase = Phase.ARMED

    def is_chosen(self, request_id: str) -> bool:
        """Whether a request was chosen and its compaction is still to come."""
        tracked = self._planner.upcoming(request_id)
        return tracked is not None and tracked.waits_for_pressure and tracked.while_decoding

    def let_rest(self, request_id: str) -> None:
        """There is memory again: do not compact a request that was chosen."""
        if self.is_chosen(request_id):
            self._planner.requests[request_id].phase = Phase.RESTING

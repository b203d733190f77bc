"""Which compactions the workers have reported on.

Blocks are swapped when the next step is scheduled; whether the compaction went well is known when
its step is through, which may be a step later. Until then nothing of it is for others: not a
conversation's next turn, not the readers of a shared prefix, not those with an equal prompt.
"""

from collections.abc import Iterable


class Reports:
    """Requests with compactions that no worker has reported on yet."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}  # and how many steps of these are under way

    def is_complete(self, request_id: str) -> bool:
        """Whether the workers have reported on all that was compacted of a request."""
        return request_id not in self._open

    def note_planned(self, request_ids: Iterable[str]) -> None:
        """A step that is on its way to the workers compacts something of these."""
        for name in request_ids:
            self._open[name] = self._open.get(name, 0) + 1

    def note_reported(self, request_ids: Iterable[str]) -> None:
        """A step that compacted something of these is through."""
        for name in request_ids:
            left = self._open.pop(name) - 1
            if left:
                self._open[name] = left

"""Times the compactions of a step without waiting for the device."""

import time
from typing import Any

import torch


class CompactionTimer:
    """Time spent on compactions, read without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._uses_events = device.type == "cuda"
        self._running: list[tuple[Any, Any]] = []
        self._done: list[float] = []

    def __enter__(self) -> "CompactionTimer":
        self._start = self._now()
        return self

    def __exit__(self, *exception: object) -> None:
        end = self._now()
        if self._uses_events:
            self._running.append((self._start, end))
        else:
            self._done.append(end - self._start)

    def _now(self) -> Any:
        if not self._uses_events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> list[float]:
        """Seconds of the compactions that are known to have finished since the last call."""
        while self._running and self._running[0][1].query():
            start, end = self._running.pop(0)
            self._done.append(start.elapsed_time(end) / 1e3)
        done, self._done = self._done, []
        return done

"""Copies measures of codebooks to the host without waiting for the device."""

from typing import Any

import torch


class CodebookMeter:
    """Sums measures [2, 4] of steps until they are asked for.

    Parameters
    ----------
    device : torch.device
        Where they are made.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._running: list[tuple[Any, torch.Tensor]] = []

    def add(self, measures: torch.Tensor | None) -> None:
        """Take one step's `CodebookWriter.take_measures`."""
        if measures is None:
            return
        if not self._is_cuda:
            self._running.append((None, measures))
            return
        copy = torch.empty(measures.shape, dtype=measures.dtype, pin_memory=True)
        copy.copy_(measures, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._running.append((event, copy))

    def take(self) -> list[list[float]] | None:
        """Sums of all that are known to be done since the last call; None if there are none."""
        done = []
        while self._running and (self._running[0][0] is None or self._running[0][0].query()):
            done.append(self._running.pop(0)[1])
        if not done:
            return None
        return torch.stack(done).sum(dim=0).tolist()  # waits: for nothing, it is on the host

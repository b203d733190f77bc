"""How a layer's cache holds its numbers: as they are, or in 8 bits times a scale."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


def _unscaled() -> tuple[float, float]:
    return 1.0, 1.0


@dataclass(frozen=True)
class CacheNumbers:
    """What the elements of one layer's cache stand for.

    Whoever moves rows moves bytes and needs none of this; whoever measures them does.

    Attributes
    ----------
    eight_bits : torch.dtype or None
        The 8-bit float type that the bytes of a uint8 cache are read as. None: the cache's own
        type is that of its numbers, and there are no scales.
    scales : callable
        Returns what keys and what values are multiplied by. Asked whenever rows are measured,
        because weights, and scales with them, may be loaded again; it must not wait for the device.
    """

    eight_bits: torch.dtype | None = None
    scales: Callable[[], tuple[float, float]] = _unscaled

    def typed(self, cache: torch.Tensor) -> torch.Tensor:
        """The same memory, as numbers without their scales."""
        return cache if self.eight_bits is None else cache.view(self.eight_bits)

    def decoded(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as a cache holds them, as numbers: in float32 if they were of 8 bits."""
        if self.eight_bits is None:
            return keys, values
        key_scale, value_scale = self.scales()
        return (
            keys.contiguous().view(self.eight_bits).float().mul_(key_scale),
            values.contiguous().view(self.eight_bits).float().mul_(value_scale),
        )

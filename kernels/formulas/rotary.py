"""Rotary position embedding as plain tensor operations: turning keys and queries after the fact.

    (a, b) -> (a cos t - b sin t, b cos t + a sin t),   t = position * inv_freq

for every pair (a, b) of the first ``2 * len(inv_freq)`` channels; further channels are not
rotated. (arXiv 2104.09864)
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of one layer.

    Attributes
    ----------
    inv_freq : torch.Tensor
        [rotary_dim / 2] float32, radians per position, on the caches' device.
    is_neox : bool
        Whether pairs are channels (i, i + rotary_dim / 2), as in Llama; else (2 i, 2 i + 1).
    """

    inv_freq: torch.Tensor
    is_neox: bool

    @property
    def rotary_dim(self) -> int:
        """Channels that are rotated."""
        return 2 * self.inv_freq.shape[0]

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split channels of [..., head_dim] into a, b (both [..., rotary_dim / 2]) and the rest."""
        rotated, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        if self.is_neox:
            a, b = rotated.chunk(2, dim=-1)
        else:
            a, b = rotated[..., ::2], rotated[..., 1::2]
        return a, b, rest

    def join(self, a: torch.Tensor, b: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """Inverse of `split`."""
        if self.is_neox:
            rotated = torch.cat([a, b], dim=-1)
        else:
            rotated = torch.stack([a, b], dim=-1).flatten(-2)
        return torch.cat([rotated, rest], dim=-1)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Turn vectors by so many positions; negative positions undo a rotation.

        Parameters
        ----------
        x : torch.Tensor
            [..., n, head_dim], any float dtype; computed in float32.
        positions : torch.Tensor
            [..., n] or [n], integer.

        Returns
        -------
        torch.Tensor
            Like `x`.
        """
        angles = positions[..., None].to(torch.float32) * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        a, b, rest = self.split(x.float())
        return self.join(a * cos - b * sin, b * cos + a * sin, rest).to(x.dtype)

    def rotate_on_average(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Mean of vectors turned by each of some positions, which is a linear map M of them.

        A covariance matrix C becomes M C M^T by two calls, one per dimension.

        Parameters
        ----------
        x : torch.Tensor
            [..., head_dim], any float dtype; computed in float32.
        positions : torch.Tensor
            [m], integer, m >= 1.

        Returns
        -------
        torch.Tensor
            Like `x`.
        """
        angles = positions[:, None].to(torch.float32) * self.inv_freq  # [m, rotary_dim / 2]
        cos, sin = angles.cos().mean(dim=0), angles.sin().mean(dim=0)
        a, b, rest = self.split(x.float())
        return self.join(a * cos - b * sin, b * cos + a * sin, rest).to(x.dtype)

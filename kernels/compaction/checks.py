"""What a selection refuses, in the same words on every device."""

import torch


def check_scores(scores: torch.Tensor, forced: torch.Tensor) -> None:
    """Refuse what `select_tokens` does not take.

    Raises
    ------
    ValueError
        If shapes or types do not fit, or the scores of a row are not neighbours.
    """
    if scores.dtype != torch.float32 or forced.dtype != torch.bool:
        raise ValueError(f"scores must be float32, forced bool: {scores.dtype}, {forced.dtype}")
    if scores.ndim != 4 or forced.shape != (scores.shape[1], scores.shape[3]):
        raise ValueError(
            f"forced {tuple(forced.shape)} does not fit scores {tuple(scores.shape)}: "
            "[L, R, KV, n] and [R, n]"
        )
    if scores.shape[3] > 1 and (scores.stride(3) != 1 or forced.stride(1) != 1):
        raise ValueError("scores and forced of neighbouring tokens must be neighbours in memory")

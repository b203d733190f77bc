"""Which tokens survive, one request at a time by stable sorts: see `compaction.select_tokens`."""

import torch

from vllm_kvcompress.kernels.compaction.checks import check_scores


def select_tokens(
    scores: torch.Tensor,
    forced: torch.Tensor,
    num_tokens: torch.Tensor,
    num_keep: torch.Tensor,
    max_keep: int,
) -> torch.Tensor:
    """As `compaction.select_tokens.select_tokens`."""
    check_scores(scores, forced)
    out = torch.full((*scores.shape[:3], max_keep), -1, dtype=torch.int64, device=scores.device)
    counts = zip(num_tokens.tolist(), num_keep.tolist(), strict=True)
    for request, (length, count) in enumerate(counts):
        rows = scores[:, request, :, :length]
        rows = torch.where(rows.isnan(), float("-inf"), rows)
        # Forced tokens all get the same score, so the sorts leave them in order of position; the
        # second sort sets them apart from tokens whose own score is +inf.
        rows = rows.masked_fill(forced[request, :length], float("inf"))
        order = rows.sort(dim=-1, descending=True, stable=True).indices
        is_forced = forced[request, :length][order].to(torch.int8)
        order = order.gather(-1, is_forced.sort(dim=-1, descending=True, stable=True).indices)
        out[:, request, :, :count] = order[..., :count].sort(dim=-1).values
    return out

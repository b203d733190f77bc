"""Which blocks of a request make up a linked view: whole blocks, the best by mean score.

Dimensions: R requests, M source blocks of the longest, K kept blocks of the longest, P blocks of a
block table row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_kvcompress.kernels.host_copy import send_together
from vllm_kvcompress.plans import GroupPlan
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.worker.batch import CompactionJob, GroupBatch, group_batches
from vllm_kvcompress.worker.compaction.compactor import Compactor, batches


@dataclass(frozen=True)
class LinkedBlocks:
    """The source blocks of one KV cache group's linked views.

    Attributes
    ----------
    group : GroupBatch
        The requests.
    num_blocks, num_keep : torch.Tensor
        [R] int32: source blocks, and how many of them stay.
    forced : torch.Tensor
        [R, M] bool: blocks with a token that stays anyway.
    """

    group: GroupBatch
    num_blocks: torch.Tensor
    num_keep: torch.Tensor
    forced: torch.Tensor

    def choose(
        self, scores: Sequence[torch.Tensor], select_tokens: Callable[..., torch.Tensor]
    ) -> list[torch.Tensor]:
        """The blocks that stay, [kept blocks] int32 per request, in the order of its own row.

        Parameters
        ----------
        scores : sequence of torch.Tensor
            R tensors [num_kv_heads, n]; all heads have the same.
        select_tokens : callable
            `kernels.compaction.select_tokens.select_tokens`.
        """
        plans, rows = self.group.plans, self.group.block_table
        means = torch.zeros(1, *self.forced.shape[:1], 1, self.forced.shape[1], device=rows.device)
        for mean, own, plan in zip(means[0, :, 0], scores, plans, strict=True):
            grid = own[0, : plan.lengths.region_len].float().unflatten(0, (-1, _block_size(plan)))
            mean[: len(grid)] = grid.mean(dim=1)
        most = max(_num_keep(plan) for plan in plans)
        best = select_tokens(means, self.forced, self.num_blocks, self.num_keep, most)[0, :, 0]
        return [
            row[own[: _num_keep(plan)]] for row, own, plan in zip(rows, best, plans, strict=True)
        ]


@torch.inference_mode()
def choose_blocks(
    compactor: Compactor, jobs: Sequence[CompactionJob]
) -> dict[tuple[str, int], torch.Tensor]:
    """Source blocks that make up linked views, by request and KV cache group.

    All heads and layers of a group have the same scores, in windows of whole blocks. A block with
    a token that stays anyway comes first.

    Returns
    -------
    dict
        [kept blocks] int32 each, in the order of the request's own row.
    """
    chosen: dict[tuple[str, int], torch.Tensor] = {}
    for batch in batches(jobs):
        policy: Policy = batch[0].config.build_policy()
        shared: dict[tuple, torch.Tensor] = {}
        leaders = {layer.group: layer for layer in reversed(compactor.layers)}
        found = group_batches(batch, dict.fromkeys(leaders, ()), compactor.device)
        linked = _linked_blocks(
            {number: group for (number, _), group in found.items()}, compactor.device
        )
        for number, layer in sorted(leaders.items(), key=lambda each: each[1].index):
            if number not in linked:
                continue
            group = linked[number].group
            scores = compactor.scores(policy, group, layer, shared)
            blocks = linked[number].choose(scores, compactor.select_tokens)
            for job, own in zip(group.jobs, blocks, strict=True):
                chosen[job.plan.request_id, number] = own
    return chosen


def _linked_blocks(
    groups: Mapping[int, GroupBatch], device: torch.device
) -> dict[int, LinkedBlocks]:
    """Send what the choice needs to the device, of all KV cache groups in one copy."""
    arrays = [array for group in groups.values() for array in _numbers(group.plans)]
    sent = iter(send_together(arrays, device))
    return {
        number: LinkedBlocks(group, next(sent), next(sent), next(sent))
        for number, group in groups.items()
    }


def _numbers(plans: Sequence[GroupPlan]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = [len(plan.source_blocks) for plan in plans]
    forced = np.zeros((len(plans), max(counts)), dtype=bool)
    for row, plan in zip(forced, plans, strict=True):
        size = _block_size(plan)
        for start, end in plan.forced:
            row[start // size : -(-end // size)] = True
    keep = [_num_keep(plan) for plan in plans]
    return np.array(counts, dtype=np.int32), np.array(keep, dtype=np.int32), forced


def _block_size(plan: GroupPlan) -> int:
    return plan.lengths.region_len // len(plan.source_blocks)


def _num_keep(plan: GroupPlan) -> int:
    return plan.lengths.kept_len // _block_size(plan)

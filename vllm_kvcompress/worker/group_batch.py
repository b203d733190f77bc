"""Requests that are compacted together in one KV cache group, as tensors for a launch.

Dimensions: R requests, P blocks of the longest, Q destination blocks of the longest, n tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_kvcompress.plans import CompactionPlan, GroupPlan, PlanKind
from vllm_kvcompress.settings import CompressionConfig


@dataclass(frozen=True)
class CompactionJob:
    """One request's compaction.

    Attributes
    ----------
    plan : CompactionPlan
        What the scheduler decided.
    config : CompressionConfig
        The request's setting.
    req_index : int
        The request's row.
    """

    plan: CompactionPlan
    config: CompressionConfig
    req_index: int


@dataclass(frozen=True)
class GroupBatch:
    """Jobs that touch one group, and their plans for it.

    Attributes
    ----------
    jobs : list[CompactionJob]
        R of them.
    plans : list[GroupPlan]
        Their plans for this group.
    block_table : torch.Tensor
        [R, P] int32: region, then what lies behind it; 0 behind a request's blocks.
    destination_table : torch.Tensor
        [R, Q] int32.
    num_tokens, region_len, num_survivors : torch.Tensor
        [R] int32, tokens scored, tokens that may be chosen, tokens chosen.
    forced : torch.Tensor
        [R, n] bool.
    """

    jobs: list[CompactionJob]
    plans: list[GroupPlan]
    block_table: torch.Tensor
    destination_table: torch.Tensor
    num_tokens: torch.Tensor
    region_len: torch.Tensor
    num_survivors: torch.Tensor
    forced: torch.Tensor

    @classmethod
    def of(
        cls,
        jobs: Sequence[CompactionJob],
        group: int,
        device: torch.device,
        kind: PlanKind = PlanKind.TOKENS,
    ) -> "GroupBatch | None":
        """Collect the jobs that do such a thing to `group`; None if there is none."""
        pairs = [(job, plan) for job in jobs if (plan := job.plan.groups[group]) is not None]
        pairs = [(job, plan) for job, plan in pairs if plan.kind is kind]
        if not pairs:
            return None
        touching, plans = [job for job, _ in pairs], [plan for _, plan in pairs]

        def numbers(rows: list) -> torch.Tensor:
            return torch.tensor(rows, dtype=torch.int32).to(device, non_blocking=True)

        forced = np.zeros((len(plans), max(plan.cache.num_tokens for plan in plans)), dtype=bool)
        for row, plan in zip(forced, plans, strict=True):
            for start, end in plan.forced:
                row[start:end] = True
        return cls(
            jobs=touching,
            plans=plans,
            block_table=numbers(_padded([p.source_blocks + p.tail_blocks for p in plans])),
            destination_table=numbers(_padded([p.destination_blocks for p in plans])),
            num_tokens=numbers([plan.cache.num_tokens for plan in plans]),
            region_len=numbers([plan.lengths.region_len for plan in plans]),
            num_survivors=numbers([plan.lengths.num_survivors for plan in plans]),
            forced=torch.from_numpy(forced).to(device, non_blocking=True),
        )

    @property
    def lengths(self) -> list[int]:
        """`num_tokens` on the host."""
        return [plan.cache.num_tokens for plan in self.plans]

    def blocks(self, request: int) -> torch.Tensor:
        """All blocks of one request, [blocks] int64."""
        plan = self.plans[request]
        count = len(plan.source_blocks) + len(plan.tail_blocks)
        return self.block_table[request, :count].long()

    def destination(self, request: int) -> torch.Tensor:
        """Destination blocks of one request, [blocks] int64."""
        return self.destination_table[request, : len(self.plans[request].destination_blocks)].long()


def _padded(rows: list[tuple[int, ...]]) -> list[list[int]]:
    width = max(len(row) for row in rows)
    return [[*row, *[0] * (width - len(row))] for row in rows]

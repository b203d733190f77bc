"""Requests that are compacted together, per KV cache group as tensors for a launch.

Dimensions: R requests, P blocks of the longest, Q destination blocks of the longest, n tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.kernels.host_copy import send_together
from vllm_kvcompress.plans import CompactionPlan, GroupPlan, PlanKind, Span


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

    Every tensor begins at a multiple of 16 bytes, so that kernels launched on them are those that
    the warm-up compiled.

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
    shown_forced : torch.Tensor
        The same, for policies to look at: what they write to it forces nothing.
    permanent : torch.Tensor or None
        [R, n] bool, tokens that no compaction evicts; None where they lead the cache already.
    addresses : torch.Tensor
        [L] int64, where the caches of the group's layers lie; empty where nobody asked.
    """

    jobs: list[CompactionJob]
    plans: list[GroupPlan]
    block_table: torch.Tensor
    destination_table: torch.Tensor
    num_tokens: torch.Tensor
    region_len: torch.Tensor
    num_survivors: torch.Tensor
    forced: torch.Tensor
    shown_forced: torch.Tensor
    permanent: torch.Tensor | None
    addresses: torch.Tensor

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


def group_batches(
    jobs: Sequence[CompactionJob],
    addresses: Mapping[int, Sequence[int]],
    device: torch.device,
) -> dict[tuple[int, PlanKind], GroupBatch]:
    """Collect what jobs do to every group, and send all numbers to the device in one copy.

    Parameters
    ----------
    jobs : sequence of CompactionJob
        What is compacted together.
    addresses : mapping of int to sequence of int
        KV cache groups to look at, with the addresses of their layers' caches.
    device : torch.device
        Where the tensors go.

    Returns
    -------
    dict
        By group and kind of plan; there is no entry where no job does such a thing.
    """
    wanted: dict[tuple[int, PlanKind], tuple[list[CompactionJob], list[GroupPlan]]] = {}
    for group in addresses:
        for job in jobs:
            plan = job.plan.groups[group]
            if plan is not None:
                touching, plans = wanted.setdefault((group, plan.kind), ([], []))
                touching.append(job)
                plans.append(plan)
    packing = _Packing()
    packed = {
        (group, kind): _numbers(packing, plans, addresses[group])
        for (group, kind), (_, plans) in wanted.items()
    }
    sent = packing.send(device)
    found = {}
    for place, own in packed.items():
        tensors: dict[str, Any] = {
            name: None if at is None else sent[at] for name, at in own.items()
        }
        found[place] = GroupBatch(*wanted[place], **tensors)
    return found


class _Packing:
    """Arrays for one copy, numbered; groups whose tokens are marked alike share the marks."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._masks: dict[tuple, int] = {}

    def add(self, numbers: list) -> int:
        self._arrays.append(np.array(numbers, dtype=np.int32))
        return len(self._arrays) - 1

    def addresses(self, addresses: Sequence[int]) -> int:
        self._arrays.append(np.array(addresses, dtype=np.int64))
        return len(self._arrays) - 1

    def mask(self, rows: Sequence[tuple[Span, ...]], width: int, copy: int = 0) -> int:
        """[R, width] bool: True in spans; each `copy` of the same marks has memory of its own."""
        key = tuple(rows), width, copy
        if key not in self._masks:
            marks = np.zeros((len(rows), width), dtype=bool)
            for row, spans in zip(marks, rows, strict=True):
                for start, end in spans:
                    row[start:end] = True
            self._arrays.append(marks)
            self._masks[key] = len(self._arrays) - 1
        return self._masks[key]

    def send(self, device: torch.device) -> list[torch.Tensor]:
        return send_together(self._arrays, device)


def _numbers(
    packing: _Packing, plans: list[GroupPlan], addresses: Sequence[int]
) -> dict[str, int | None]:
    """Where in the packing each tensor of a `GroupBatch` is."""
    width = max(plan.cache.num_tokens for plan in plans)
    scattered = any(_is_scattered(plan) for plan in plans)
    return {
        "block_table": packing.add(_padded([p.source_blocks + p.tail_blocks for p in plans])),
        "destination_table": packing.add(_padded([p.destination_blocks for p in plans])),
        "num_tokens": packing.add([plan.cache.num_tokens for plan in plans]),
        "region_len": packing.add([plan.lengths.region_len for plan in plans]),
        "num_survivors": packing.add([plan.lengths.num_survivors for plan in plans]),
        "forced": packing.mask([plan.forced for plan in plans], width),
        "shown_forced": packing.mask([plan.forced for plan in plans], width, copy=1),
        "permanent": packing.mask([p.cache.permanent for p in plans], width) if scattered else None,
        "addresses": packing.addresses(addresses),
    }


def _is_scattered(plan: GroupPlan) -> bool:
    """Whether tokens that stay for good lie elsewhere in the region than at its beginning."""
    inside = [start for start, _ in plan.cache.permanent if start < plan.lengths.region_len]
    return len(inside) > 1 or any(inside)


def _padded(rows: list[tuple[int, ...]]) -> list[list[int]]:
    width = max(len(row) for row in rows)
    return [[*row, *[0] * (width - len(row))] for row in rows]

"""What goes wrong in a step's compactions, by request.

The scheduler has planned the step by lengths alone and has counted on it: blocks are swapped when
the next step is scheduled, whatever happened here. So a compaction that fails is carried out all
the same, over scores of zero or with empty blocks, and rows stay what the scheduler believes. Then
it is told: the step's flags travel with the step's output, and the request starts again without
compression before a token that was computed from such a cache reaches anybody.

What fails on one rank fails the request on all of them, so flags are summed over ranks, and carried
on from stage to stage of a pipeline. Nothing here waits for the device: NaN scores are found there,
and read with the step's own output.

Dimensions: L layers, KV key-value heads, n tokens, R requests of the step.
"""

import logging
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch

from vllm_kvcompress.kernels.host_copy import to_device, to_host
from vllm_kvcompress.messages import StepReport
from vllm_kvcompress.worker.batch import CompactionJob

logger = logging.getLogger(f"vllm.{__name__}")

ERROR, NAN_SCORES = "error", "nan_scores"
"""What may happen; values of the metric's `reason` label."""

KINDS = (ERROR, NAN_SCORES)

Flags: TypeAlias = torch.Tensor
"""[2, R] float32, above zero where a request met one of `KINDS`."""


class StepFaults:
    """Collects what goes wrong in one step, for requests whose turn it is.

    Parameters
    ----------
    request_ids : iterable of str
        R of them, in the order of the step's plans; a name may come twice.
    device : torch.device
        Where scores are.

    Attributes
    ----------
    errors : dict[str, Exception]
        What was raised first for a request, on this rank.
    """

    def __init__(self, request_ids: Iterable[str], device: torch.device) -> None:
        self.request_ids = list(dict.fromkeys(request_ids))
        self.device = device
        self.errors: dict[str, Exception] = {}
        self._highest: dict[str, list[torch.Tensor]] = {name: [] for name in self.request_ids}

    def note(self, request_ids: Iterable[str], error: Exception) -> None:
        """Something was raised in what is done to these requests."""
        names = [name for name in request_ids if name not in self.errors]
        if not names:
            return
        self.errors.update(dict.fromkeys(names, error))
        logger.error(
            "KV compression: requests %s could not be compressed (%s: %.300s); they start again "
            "without compression.\n%s",
            ", ".join(names), type(error).__name__, error,
            "".join(traceback.format_exception(error)[-8:]),
        )  # fmt: skip

    @contextmanager
    def of(self, jobs: Sequence[CompactionJob]) -> Iterator[None]:
        """Work on all of these: what it raises is noted for each, and goes no further."""
        try:
            yield
        except Exception as error:  # a policy's, a kernel's, no memory: any of them
            self.note((job.plan.request_id for job in jobs), error)

    def look_at(
        self, jobs: Sequence[CompactionJob], regions: Sequence[int], scores: torch.Tensor
    ) -> None:
        """Look for NaN in [L, R, KV, n] scores, of which each request has its region.

        Where nothing but NaN was compared no order means anything, and one NaN says that the
        others may be as wrong. Infinite scores are in order.
        """
        for request, (job, region) in enumerate(zip(jobs, regions, strict=True)):
            # A maximum is NaN if anything is, and takes one launch and no memory.
            highest = scores[:, request, :, :region].amax()
            self._highest[job.plan.request_id].append(highest)

    def flags(self) -> Flags:
        """What was found so far, on the device."""
        raised = np.array([name in self.errors for name in self.request_ids], dtype=np.float32)
        found = [self._of_one(name) for name in self.request_ids]
        is_nan = torch.stack(found).isnan().float()
        return torch.stack([to_device(raised, torch.float32, self.device), is_nan])

    def _of_one(self, name: str) -> torch.Tensor:
        found = self._highest[name]
        if not found:
            return torch.zeros((), device=self.device)
        return found[0] if len(found) == 1 else torch.stack(found).amax()


class PendingFlags:
    """A step's flags on their way to the host.

    Parameters
    ----------
    request_ids : sequence of str
        R of them.
    flags : torch.Tensor
        [2, R] on the device.
    """

    def __init__(self, request_ids: Sequence[str], flags: Flags) -> None:
        self.request_ids = list(request_ids)
        self._copy = to_host(flags)

    def read(self) -> dict[str, str]:
        """What each request met, by name; only once the step's output is on the host."""
        found: dict[str, str] = {}
        rows = self._copy.tolist()  # waits: for nothing, it is on the host
        for kind, row in zip(KINDS, rows, strict=True):
            for name, flag in zip(self.request_ids, row, strict=True):
                if flag > 0:
                    found.setdefault(name, kind)
        return found

    def add_to(self, report: StepReport) -> StepReport:
        """The report with what was found; only once the step's output is on the host."""
        failed = self.read()
        return replace(report, failed=failed) if failed else report

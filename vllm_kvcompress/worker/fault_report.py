"""Takes faults of a step to the scheduler with its output: over ranks, stages and the device.

    ranks of a stage    one sum of small numbers, in steps that compact
    stage to stage      with what vLLM sends the next stage anyway
    device to host      copied beside the sampled tokens, read once these are there

So nothing waits for it, and it is there before anybody hears of a later step's tokens.
"""

import os
import zlib
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Protocol

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.sequence import IntermediateTensors

from vllm_kvcompress.messages import StepReport
from vllm_kvcompress.worker.compaction.compactor import Compactor
from vllm_kvcompress.worker.compaction.faults import PendingFlags, StepFaults

logger = init_logger(f"vllm.{__name__}")

_KEY = "kv_compression_faults"
"""Our tensor among those that a stage sends to the next."""


class Late(Protocol):
    """News that are on the host as soon as the output of the step that they go with is."""

    def add_to(self, report: StepReport) -> StepReport:
        """The report with this news."""


class FaultReport:
    """One rank's part of that.

    Parameters
    ----------
    is_last_stage : bool
        Whether this rank's output goes to the scheduler.
    """

    def __init__(self, is_last_stage: bool) -> None:
        self.is_last_stage = is_last_stage
        self._pending: PendingFlags | None = None

    def begin(
        self, faults: StepFaults, compactor: Compactor, output: Any, received: Any = None
    ) -> Any:
        """Behind a step's compactions: what the model runner returns for the step's forward pass.

        Parameters
        ----------
        faults : StepFaults
            Of this rank.
        compactor : Compactor
            Whose ranks they are.
        output : Any
            What vLLM's model runner has returned: None, or tensors for the next stage.
        received : IntermediateTensors, optional
            What the stage before has sent.
        """
        flags = faults.flags()
        if compactor.num_ranks > 1:
            if faults.errors and not _failed_alike(faults, compactor.num_sums):
                leave("compressing", faults.errors)
            flags = compactor.all_reduce(flags)
        before = None if received is None else received.tensors.get(_KEY)
        if before is not None:
            flags = flags + before
        if self.is_last_stage:
            self._pending = PendingFlags(faults.request_ids, flags)
            return output
        assert isinstance(output, IntermediateTensors)
        return IntermediateTensors({**output.tensors, _KEY: flags})

    def end(self, output: Any, others: Iterable[Late] = ()) -> None:
        """Let what the model runner returns for the step's samples tell of the step's faults.

        `others` are news that go with the same output.
        """
        own, self._pending = self._pending, None
        pending: list[Late] = [*others] if own is None else [own, *others]
        if not pending or output is None:
            return
        if not hasattr(output, "get_output"):
            _attach(output, pending)
            return
        get_output = output.get_output

        def with_faults() -> Any:
            found = get_output()
            _attach(found, pending)
            return found

        output.get_output = with_faults


def _attach(carrier: Any, pending: Iterable[Late]) -> None:
    """Add news to what is reported already."""
    before = report = StepReport.of(carrier)
    for each in pending:
        report = each.add_to(report)
    if report is not before:
        report.attach(carrier)


# --- ranks that must stay in step ---------------------------------------------------------

_TAG = 0x6B76  # of messages between ranks that nobody else sends
PATIENCE = timedelta(seconds=20)
"""How long a rank on which something failed waits for word that it failed on the others, too."""


def _failed_alike(faults: StepFaults, num_sums: int) -> bool:
    """Whether all ranks of the stage met the same errors, behind as many sums over ranks.

    Only a rank on which something failed asks, and answers: on the others nothing waits. What it
    would have summed with them, and did not, would meet their next sum otherwise.
    """
    names = ",".join(sorted(faults.errors))
    return alike(get_tp_group(), [zlib.crc32(names.encode()), num_sums])


def alike(group: Any, numbers: list[int]) -> bool:
    """Whether all ranks of a group say the same, in time; False as well if one says nothing.

    Parameters
    ----------
    group : GroupCoordinator
        vLLM's.
    numbers : list of int
        What this rank says.
    """
    own = torch.tensor(numbers, dtype=torch.int64)
    others = [rank for rank in group.ranks if rank != group.rank]
    heard = [torch.empty_like(own) for _ in others]
    options: dict[str, Any] = {"group": group.cpu_group, "tag": _TAG}
    pairs = zip(heard, others, strict=True)
    try:
        work = [torch.distributed.isend(own, dst=rank, **options) for rank in others]
        work += [torch.distributed.irecv(into, src=rank, **options) for into, rank in pairs]
        for each in work:
            each.wait(timeout=PATIENCE)
    except RuntimeError:
        return False
    return all(torch.equal(each, own) for each in heard)


def leave(work: str, request_ids: Iterable[str]) -> None:
    """End this process: vLLM notices, and ends the engine, as when a worker is killed.

    `work` is what failed for these requests.
    """
    logger.critical(
        "KV compression: %s requests %s failed on rank %d alone, and its sums over ranks no longer "
        "meet those of the others. This worker ends, and the engine with it; the error is above.",
        work, ", ".join(request_ids), get_tp_group().rank,
    )  # fmt: skip
    os._exit(1)

"""What goes wrong while drafts are made, and how ranks agree on it.

Drafts need not be made: where that fails, requests go on without. Over several tensor-parallel
ranks this holds only if all failed at the same place, for a draft step sums over ranks in every
layer, and who leaves it early meets the others' sums with its own later ones. So a rank on which
drafting failed asks the others; one that is alone ends, as for a compaction (fault_report.py).

A NaN among a draft's logits is found on the device, alike on all ranks, which have the same logits.
It is read with the output of the step behind, for which nothing waits.
"""

import traceback
import zlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from vllm.distributed.parallel_state import get_tp_group

from vllm_kvcompress.kernels.host_copy import to_host
from vllm_kvcompress.messages import StepReport
from vllm_kvcompress.worker.fault_report import alike

RAISED, NAN_LOGITS = "drafting", "nan_drafts"
"""What may happen; values of the metric's `reason` label."""


def failed_alike(error: Exception, model: torch.nn.Module, num_calls: int, num_steps: int) -> bool:
    """Whether drafting has failed at this place on all ranks; True if there is one.

    Parameters
    ----------
    error : Exception
        What was raised.
    model : torch.nn.Module
        What was run.
    num_calls, num_steps : int
        Steps of the engine in which this rank drafted, and draft steps done in this one.
    """
    group = get_tp_group()
    return group.world_size == 1 or alike(group, [num_calls, num_steps, place_of(error, model)])


def place_of(error: Exception, model: torch.nn.Module) -> int:
    """A number for where in the program something was raised: the same for the same place only.

    Places are instructions, modules of the model by name, and counters of its loops, so a layer is
    told from the next, which runs the same lines.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found, step = [type(error).__name__], error.__traceback__
    while step is not None:
        frame = step.tb_frame
        module = names.get(id(frame.f_locals.get("self")))
        found.append(f"{frame.f_code.co_name} {frame.f_code.co_firstlineno} {step.tb_lasti}")
        if module is not None:
            numbers = {k: v for k, v in frame.f_locals.items() if type(v) is int}
            found.append(f"{module} {sorted(numbers.items())}")
        step = step.tb_next
    return zlib.crc32("\n".join(found).encode())


def describe(error: Exception) -> str:
    """The end of its traceback, for the log."""
    return "".join(traceback.format_exception(error)[-8:])


class PendingNans:
    """Which requests' drafts had a NaN among their logits, on its way to the host.

    Parameters
    ----------
    request_ids : sequence of str
        d of them.
    found : torch.Tensor
        [d] bool on the device.
    """

    def __init__(self, request_ids: Sequence[str], found: torch.Tensor) -> None:
        self.request_ids, self._found = list(request_ids), to_host(found)

    def add_to(self, report: StepReport) -> StepReport:
        """The report with these requests; only once what was launched before is done."""
        flags = self._found.tolist()  # waits: for nothing, it is on the host
        names = [name for name, flag in zip(self.request_ids, flags, strict=True) if flag]
        if not names:
            return report
        return replace(
            report, drafts_failed=dict.fromkeys(names, NAN_LOGITS) | dict(report.drafts_failed)
        )

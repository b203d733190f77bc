"""How deep vLLM's pools of host buffers are, and which table stays on the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor, set_default_max_concurrency


@contextmanager
def pools_for_writes_per_step(num_writes: int, steps_in_flight: int) -> Iterator[None]:
    """Make vLLM's pools of host buffers deep enough for several writes in one step.

    Kernels read indices and lengths of staged writes from these buffers when they run, not when
    they are launched. vLLM recycles a buffer after as many writes as steps are in flight; a second
    write per step would overwrite one that a kernel in the queue has not read yet.
    """
    set_default_max_concurrency(num_writes * steps_in_flight)
    try:
        yield
    finally:
        set_default_max_concurrency(steps_in_flight)


def keep_token_ids_on_host(req_states: Any) -> None:
    """Put the table of all token ids back to where vLLM has it without n-gram drafts.

    Draft mode is configured as n-gram drafts, which scan that table, so vLLM puts it on the
    device: 4 bytes for each of `max_num_seqs` times `max_model_len`. Our drafts do not read it. To
    be called before anything else holds the table, and before memory is profiled.
    """
    before = req_states.all_token_ids
    req_states.all_token_ids = StagedWriteTensor(
        before.gpu.shape, dtype=before.dtype, device=before.device, uva_instead_of_gpu=True
    )

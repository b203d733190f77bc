"""How deep vLLM's pools of host buffers are."""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.v1.worker.gpu.buffer_utils import set_default_max_concurrency


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

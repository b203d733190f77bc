"""Which table of vLLM's stays on the host although it drafts."""

from typing import Any

from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor


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

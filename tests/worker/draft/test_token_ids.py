"""Where the table of all token ids lies."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu import buffer_utils

from vllm_kvcompress.worker.draft.token_ids import keep_token_ids_on_host


def test_draft_mode_keeps_the_table_of_token_ids_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)  # nothing is pinned here
    made: list[dict[str, Any]] = []
    init = buffer_utils.StagedWriteTensor.__init__

    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(kwargs)
        init(self, *args, **kwargs)

    dense = buffer_utils.StagedWriteTensor((3, 8), torch.int32, torch.device("cpu"))
    monkeypatch.setattr(buffer_utils.StagedWriteTensor, "__init__", recording)
    states = SimpleNamespace(all_token_ids=dense)
    keep_token_ids_on_host(states)
    table = states.all_token_ids
    assert table is not dense and made[0]["uva_instead_of_gpu"] is True
    assert (table.gpu.shape, table.gpu.dtype) == ((3, 8), torch.int32)
    assert (table.num_rows, table.device) == (dense.num_rows, dense.device)

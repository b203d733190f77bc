"""Tables that the host writes: when kernels see it, and where they lie."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu import buffer_utils

from vllm_kvcompress.worker import host_buffers
from vllm_kvcompress.worker.host_mirror import HostMirror


class Shared:
    """A host buffer that kernels read in place, as ``UvaBuffer`` is where memory can be pinned."""

    def __init__(self, size: Any, dtype: torch.dtype) -> None:
        self.cpu = torch.zeros(size, dtype=dtype)
        self.np = self.cpu.numpy()

    def uva(self, n: int | None = None) -> torch.Tensor:
        return self.cpu[:n]


@pytest.fixture(autouse=True)
def shared_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: True)
    monkeypatch.setattr(buffer_utils, "UvaBuffer", Shared)


def test_kernels_see_what_was_sent_at_one_address() -> None:
    mirror = HostMirror((2, 3), torch.device("cpu"))
    seen = mirror.gpu
    mirror.np[1, 2] = 7
    assert seen.tolist() == [[0, 0, 0]] * 2, "not sent yet"
    mirror.send()
    assert mirror.gpu is seen and seen.tolist() == [[0, 0, 0], [0, 0, 7]]
    mirror.np[:] = 1
    assert seen.tolist() == [[0, 0, 0], [0, 0, 7]], "no view of the host's memory"


def test_a_buffer_that_is_written_again_does_not_reach_earlier_steps() -> None:
    """Every buffer of the pool is overwritten while a draft step of an earlier step has to run."""
    mirror = HostMirror((4,), torch.device("cpu"))
    mirror.np[:] = 5
    mirror.send()
    for buffer in mirror._pool._uva_bufs:
        buffer.np[:] = -1
    assert mirror.gpu.tolist() == [5] * 4


def test_draft_mode_keeps_the_table_of_token_ids_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[dict[str, Any]] = []
    init = buffer_utils.StagedWriteTensor.__init__

    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(kwargs)
        init(self, *args, **kwargs)

    dense = buffer_utils.StagedWriteTensor((3, 8), torch.int32, torch.device("cpu"))
    monkeypatch.setattr(buffer_utils.StagedWriteTensor, "__init__", recording)
    states = SimpleNamespace(all_token_ids=dense)
    host_buffers.keep_token_ids_on_host(states)
    table = states.all_token_ids
    assert table is not dense and made[0]["uva_instead_of_gpu"] is True
    assert (table.gpu.shape, table.gpu.dtype) == ((3, 8), torch.int32)
    assert (table.num_rows, table.device) == (dense.num_rows, dense.device)

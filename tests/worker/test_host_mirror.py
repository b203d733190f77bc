"""Tables that the host writes: when kernels see it."""

import torch

from vllm_kvcompress.worker.host_mirror import HostMirror


def test_kernels_see_what_was_sent_at_one_address() -> None:
    mirror = HostMirror((2, 3), torch.device("cpu"))
    seen = mirror.gpu
    mirror.np[1, 2] = 7
    assert seen.tolist() == [[0, 0, 0]] * 2, "not sent yet"
    mirror.send()
    assert mirror.gpu is seen and seen.tolist() == [[0, 0, 0], [0, 0, 7]]
    mirror.np[:] = 1
    assert seen.tolist() == [[0, 0, 0], [0, 0, 7]], "no view of the host's memory"

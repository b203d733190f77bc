"""How a layer group of one layer chooses its survivors: few programs, each with much to do."""

import torch

from tests.stand_in import META, replace_launches
from vllm_kvcompress.kernels.compaction.select_tokens import select_tokens


def test_few_rows_are_taken_in_longer_tiles_however_many_requests(monkeypatch) -> None:
    """A layer alone has 8 rows of Llama-3-8B for 132 multiprocessors: 128k tokens were 32 tiles."""
    found: list[tuple[int, int]] = []
    replace_launches(
        monkeypatch, lambda *call: found.append((call[2]["TILE"], call[2]["num_warps"]))
    )
    for num_layers, num_requests in ((1, 1), (1, 64), (8, 1), (32, 64)):
        scores = torch.zeros(1, 1, 1, 131072, device=META).expand(num_layers, num_requests, 8, -1)
        counts = torch.zeros(num_requests, dtype=torch.int32, device=META)
        forced = torch.zeros(num_requests, 131072, dtype=torch.bool, device=META)
        select_tokens(scores, forced, counts, counts, 16)
    assert found == [(8192, 16), (8192, 16), (4096, 8), (4096, 8)]

"""Layers that share one ranking keep the same tokens; the others rank for themselves."""

import pytest
import torch

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation.replay import Replay


@pytest.fixture(scope="module")
def survivors(probe_model: str):
    torch.set_num_threads(1)
    replay = Replay(probe_model, 32)
    prompt = replay.prefill([5 + (i * 7919) % 900 for i in range(900)])

    def keep(size: int | None, is_shared: bool = True) -> list[list[int]]:
        policy = {"window_size": 8, "layers_per_leader": size, "share_indices": is_shared}
        config = parse_config("windowkv", {"policy": policy})
        found = replay.survivors(prompt, config.by_task["localization"])
        assert all(torch.equal(heads, heads[:1].expand_as(heads)) for heads in found)
        return [heads[0].tolist() for heads in found]

    return keep


def test_leaders_rank_for_those_that_follow(survivors) -> None:
    own = survivors(1)
    assert len({tuple(each) for each in own}) == 4, "layers that would choose differently"
    assert survivors(None, is_shared=False) == own
    assert survivors(2) == [own[0], own[0], own[2], own[2]]
    assert survivors(3) == [own[0], own[0], own[0], own[3]]
    assert survivors(None) == survivors(9) == [own[0]] * 4

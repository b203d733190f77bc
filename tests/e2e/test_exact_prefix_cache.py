"""What is in the prefix cache is what an uncompressed request computes, in every layer.

After a compressed request, each block that is hashed for its tokens, in each KV cache group, is
compared with what a prefill from an empty cache writes.
"""

from typing import Any

import pytest
import torch

from tests.e2e.conftest import FOUR_GROUPS, assert_idle, opened
from tests.inside import managers
from vllm_kvcompress.evaluation.engine import Engine

pytestmark = pytest.mark.engine

NONE = {"kv_compression": "none"}
FOUR = {"layer_groups": {"count": 4}}
SETTINGS: dict[str, dict[str, Any]] = {
    # The last group keeps everything: its lengths are None, its inputs are not exact all the same.
    "one group whole": {
        "preset": "snapkv", "budget": {"ratio": 0.55}, "layer_groups": {"count": 2},
        "layer_budget": {"shape": "preference", "preferences": [0.01, 1.0]},
    },
    "first group whole": {
        "preset": "snapkv", "budget": {"ratio": 0.55}, "layer_groups": {"count": 2},
        "layer_budget": {"shape": "preference", "preferences": [1.0, 0.01]},
    },
    "interval": {"preset": "snapkv", "trigger": "both", "interval": 64, "budget": {"tokens": 256}},
    "one coded": {
        "preset": "spindlekv", "budget": {"ratio": 1.0}, **FOUR,
        "codebook": {"groups": [0], "entries": 0.25},
    },
    "spindlekv": {"preset": "spindlekv"},
    "copied view": {"preset": "snapkv", "mode": "draft", "draft": {"tokens": 3}},
    "linked view": {**FOUR_GROUPS, "mode": "draft", "draft": {"tokens": 3}},
}  # fmt: skip


def hashed_rows(engine: Engine, tokens: list[int]) -> list[dict[int, torch.Tensor]]:
    """Per KV cache group: by block number, K and V of all layers of the blocks hashed for these."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    hasher = engine.core.request_block_hasher
    probe = Request("probe", tokens, SamplingParams(max_tokens=1), None, block_hasher=hasher)
    found = []
    for group in range(len(managers(engine))):
        layers = [each for each in engine.runner.compactor.layers if each.group == group]
        rows = {}
        for number, block_hash in enumerate(probe.block_hashes):
            if (hit := engine.pool.get_cached_block(block_hash, [group])) is None:
                continue
            block = torch.tensor([hit[0].block_id])
            rows[number] = torch.stack(
                [torch.cat(each.layout.read(each.cache(), block), -1) for each in layers]
            ).clone()
        found.append(rows)
    return found


def check_exact(engine: Engine, tokens: list[int], num_least: int) -> None:
    """Compare all that is hashed for `tokens` with a clean prefill of them."""
    found = hashed_rows(engine, tokens)
    assert engine.scheduler.reset_prefix_cache()
    engine.generate([tokens], 1, NONE, ignore_eos=True)
    clean = hashed_rows(engine, tokens)
    for group, (rows, exact) in enumerate(zip(found, clean, strict=True)):
        assert len(rows) >= num_least and rows.keys() <= exact.keys()
        for number, row in rows.items():
            torch.testing.assert_close(
                row, exact[number], rtol=1e-3, atol=1e-3, msg=f"group {group}, block {number}"
            )


@pytest.mark.parametrize("name", SETTINGS)
def test_hashed_blocks_are_exact(probe_model: str, name: str) -> None:
    prompt = [5 + (i * 7919) % 900 for i in range(1000)]
    with opened(probe_model, SETTINGS[name], max_model_len=4096) as engine:
        answer = engine.generate([prompt], 70, ignore_eos=True)[0]
        # A second turn reads hits of the first.
        turn = engine.generate([[*prompt, *answer, 7, 8]], 40, ignore_eos=True)[0]
        check_exact(engine, [*prompt, *answer, 7, 8, *turn], len(prompt) // 32)
        assert_idle(engine)


def test_a_request_that_opts_out_is_not_touched_by_a_compressed_one(probe_model: str) -> None:
    """Tokens of an opted-out conversation behind a compressed turn equal a clean server's."""
    prompt = [5 + (i * 7919) % 900 for i in range(1000)]
    with opened(probe_model, SETTINGS["one group whole"], max_model_len=4096) as engine:
        answer = engine.generate([prompt], 70, ignore_eos=True)[0]
        turn = [*prompt, *answer[:-1], 50, 60, 70]
        first = engine.generate([turn], 20, NONE, ignore_eos=True)[0]
        second = engine.generate([[*turn, *first]], 20, NONE, ignore_eos=True)[0]
        assert engine.scheduler.reset_prefix_cache()
        assert engine.generate([[*turn, *first]], 20, NONE, ignore_eos=True)[0] == second

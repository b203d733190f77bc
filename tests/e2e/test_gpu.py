"""On a GPU: full decode graphs and eager execution give the same tokens over a compacted cache."""

import pytest
import torch

from tests.e2e.conftest import FOUR_GROUPS, assert_idle, opened

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

KINDS = [None, {"kv_compression": "snapkv"}, {"kv_compression": "keydiff"}]
ARGS = {"dtype": "bfloat16", "block_size": 16}


def test_full_decode_graphs_read_no_stale_length(probe_model: str, prompts) -> None:
    cut = [prompt[-1025:] for prompt in prompts[:3]]  # ends in a chunk of one token
    with opened(probe_model, FOUR_GROUPS, **ARGS, max_num_batched_tokens=512) as engine:
        eager = [
            engine.generate([p], 48, k, ignore_eos=True)[0] for p, k in zip(cut, KINDS, strict=True)
        ]
        assert_idle(engine)
    graphs = {**ARGS, "enforce_eager": False, "max_num_batched_tokens": 512}
    with opened(probe_model, FOUR_GROUPS, **graphs) as engine:
        mode = engine.runner.cudagraph_manager.cudagraph_mode
        assert mode.decode_mode().name == "FULL", mode
        found = [
            engine.generate([p], 48, k, ignore_eos=True)[0] for p, k in zip(cut, KINDS, strict=True)
        ]
        assert sum(engine.scheduler.stats.requests.values()) == 3
        assert_idle(engine)
    agree = sum(
        a == b for x, y in zip(eager, found, strict=True) for a, b in zip(x[:8], y[:8], strict=True)
    )
    assert agree >= 22, "the first eight tokens carry the answer; rounding may change later ones"


def test_the_ring_is_captured_with_full_decode_graphs(probe_model: str, prompts) -> None:
    """Compactions every 32 generated tokens: the queries they read were written by replays."""
    setting = {
        "preset": "snapkv",
        "budget": {"tokens": 256},
        "observation_window": 16,
        "trigger": "both",
        "interval": 32,
        "min_prompt_len": 0,
    }
    windows = {}
    for eager in (True, False):
        with opened(probe_model, setting, **ARGS, enforce_eager=eager) as engine:
            compactor, taken = engine.runner.compactor, []
            take = compactor.sources.ring.take

            def spy(*args, take=take, taken=taken):
                taken.append(take(*args).float().cpu())
                return taken[-1].to(engine.runner.device)

            object.__setattr__(compactor.sources.ring, "take", spy)
            engine.generate([prompts[0][:700]], 100, ignore_eos=True)
            assert engine.scheduler.stats.compactions["snapkv/decode"] == 3
            windows[eager] = taken
            assert_idle(engine)
    # Same tokens up to the first interval at least: the first windows agree up to rounding.
    for one, other in zip(windows[True][:4], windows[False][:4], strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.3)

"""On a GPU: full decode graphs and eager execution give the same tokens over a compacted cache."""

from collections.abc import Callable
from typing import Any

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


def noting(replay: Callable[[Any], Any], sizes: list[int]) -> Callable[[Any], None]:
    def noted(desc: Any) -> None:
        sizes.append(desc.num_tokens)
        replay(desc)

    return noted


def test_drafts_from_graphs_are_those_of_eager_steps(probe_model: str, prompts) -> None:
    """Batches of one to five rows, five being more than the largest graph; float32 on purpose:
    rows of another batch shape may then differ by a rounding, and drafts only where two are tied.
    """
    setting = {
        "preset": "snapkv",
        "mode": "draft",
        "budget": {"ratio": 0.25},
        "draft": {"tokens": 4},
        "min_prompt_len": 128,
    }
    found, steps, sizes = {}, {}, [1, 2, 4, 8, 16, 20]
    for eager in (True, False):
        arguments: dict[str, Any] = {"dtype": "float32", "block_size": 16, "enforce_eager": eager}
        if not eager:
            arguments["compilation_config"] = {"cudagraph_capture_sizes": sizes}
        with opened(probe_model, setting, **arguments, max_num_seqs=5) as engine:
            manager, replays = engine.runner.speculator.cudagraph_manager, []
            assert bool(manager.graphs) != eager
            if not eager:
                assert {desc.num_tokens for desc in manager.graphs} == {1, 2, 4}
                manager.run_fullgraph = noting(manager.run_fullgraph, replays)
            tokens = [engine.generate([prompts[0]], 32, ignore_eos=True)]
            for count in (2, 3, 5):
                tokens.append(engine.generate(prompts[:count], 32, ignore_eos=True))
            found[eager], steps[eager] = tokens, engine.num_steps
            assert bool(replays) != eager
            assert eager or set(replays) == {1, 2, 4}
            assert_idle(engine)
    assert found[True] == found[False]
    assert abs(steps[True] - steps[False]) <= 2, "drafts of graphs are accepted as often"


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

"""The same requests under other schedulings give the same tokens. One engine after the other."""

import pytest

from lab.scenarios import churn
from tests.e2e.conftest import FOUR_GROUPS, assert_idle, opened
from tests.inside import managers

pytestmark = pytest.mark.engine

UNIFORM = {**FOUR_GROUPS, "layer_budget": {"shape": "uniform"}}
KINDS = [None, {"kv_compression": "snapkv"}, {"kv_compression": "keydiff"}]


@pytest.fixture(scope="module")
def expected(probe_model: str, prompts) -> dict[int, list[list[int]]]:
    """Tokens by prompt length; 1,025 and 1,024 + 512 + 1 end in chunks of one token below."""
    with opened(probe_model, UNIFORM) as engine:
        return {
            length: engine.generate(
                [prompt[-length:] for prompt in prompts[:3]], 24, KINDS, ignore_eos=True
            )
            for length in (1025, 1300)
        }


def test_async_scheduling(probe_model: str, prompts, expected) -> None:
    with opened(probe_model, UNIFORM, async_scheduling=True) as engine:
        assert type(engine.scheduler).__name__ == "CompressedAsyncScheduler"
        assert engine.core.batch_queue is not None, "steps really overlap"
        for length, tokens in expected.items():
            cut = [prompt[-length:] for prompt in prompts[:3]]
            assert engine.generate(cut, 24, KINDS, ignore_eos=True) == tokens
        assert_idle(engine)
        report = churn(engine, 25, seed=3)
        assert (report.blocks_missing, report.evicted_left) == (0, 0)
        assert report.aborted_before_commit > 0


@pytest.mark.parametrize(
    "engine_args",
    [
        {"max_num_batched_tokens": 512},  # chunks of 512, the last one of one token
        {"max_num_batched_tokens": 1024, "max_num_seqs": 1},
        {"enable_prefix_caching": False, "max_num_batched_tokens": 2048},
    ],
    ids=["last chunk of one token", "one at a time", "no prefix cache"],
)
def test_chunking_does_not_matter(probe_model: str, prompts, expected, engine_args) -> None:
    with opened(probe_model, UNIFORM, **engine_args) as engine:
        for length, tokens in expected.items():
            cut = [prompt[-length:] for prompt in prompts[:3]]
            for prompt, kind, each in zip(cut, KINDS, tokens, strict=True):
                assert engine.generate([prompt], 24, kind, ignore_eos=True) == [each]
        assert_idle(engine)


def test_one_layer_group_equals_four_with_one_budget(probe_model: str, prompts, expected) -> None:
    policy = {**FOUR_GROUPS["policy"], "share_indices": False}  # every layer ranks, as above
    one = {"policy": policy, "layer_groups": {"count": 1}}
    with opened(probe_model, {**UNIFORM, **one}) as engine:
        for length, tokens in expected.items():
            cut = [prompt[-length:] for prompt in prompts[:3]]
            kinds = [None, *KINDS[1:]]
            assert engine.generate(cut, 24, kinds, ignore_eos=True) == tokens
        assert len(managers(engine)) == 1
        assert_idle(engine)


def test_uneven_groups_and_a_pyramid(probe_model: str, prompts) -> None:
    """Three groups over four layers: vLLM pads them; every group keeps its own number."""
    setting = {
        "preset": "keydiff",
        "budget": {"ratio": 0.3},
        "layer_groups": {"size": 3},
        "layer_budget": {"shape": "pyramid", "beta": 5},
    }
    with opened(probe_model, setting) as engine:
        engine.add("r", prompts[0], 20, ignore_eos=True)
        seen = set()
        while engine.engine.has_unfinished_requests():
            engine.step()
            for manager in managers(engine):
                seen |= {(manager.kv_cache_spec.layer_group, n) for n in manager.evicted.values()}
        evicted = dict(seen)
        assert len(seen) == 2 and evicted[0] < evicted[1], "deeper layers keep less"
        assert_idle(engine)

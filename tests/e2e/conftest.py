"""Engines for the tests of whole requests. One engine may live in a process at a time.

Fixtures are module-scoped: a module opens an engine, all its tests share it, and it is closed
before the next module opens another.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.inside import managers
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.tasks.needle import NeedleSample, make_samples
from vllm_kvcompress.worker.codebook.feature import CodebookFeature

FOUR_GROUPS = {
    "preset": "windowkv",
    "policy": {"window_size": 32, "layers_per_leader": None},
    "layer_groups": {"count": 4},
    "layer_budget": {"shape": "windowkv", "form": "released", "gamma": 8},
}
"""Windows of whole blocks, and a leader, a block table and a budget of its own per layer."""

OpenEngine = Callable[..., Any]


@contextmanager
def opened(model: str, setting: Any, **kwargs: Any) -> Iterator[Engine]:
    """An engine that is closed whatever happens."""
    engine = Engine(model, setting, **kwargs)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def serving(engine: Engine, setting: dict[str, Any]) -> Iterator[None]:
    """Let new requests run under another setting with the server's layer groups."""
    scheduler, state = engine.scheduler, engine.runner.model_state
    own = state.config
    scheduler.planner.config = state.config = parse_config(setting)
    try:
        yield
    finally:
        scheduler.planner.config = state.config = own


def feature_of(engine: Engine, kind: type[Any]) -> Any:
    """The worker's feature of this kind."""
    return next(each for each in engine.runner.features if isinstance(each, kind))


def held(engine: Engine, name: str) -> dict[bool, list[int]]:
    """Blocks of a request, by whether the group is compacted."""
    found: dict[bool, list[int]] = {True: [], False: []}
    request_id = engine.live()[name].request_id
    for manager in managers(engine):
        blocks = [each for each in manager.req_to_blocks[request_id] if not each.is_null]
        found[isinstance(manager, CompressedAttentionManager)].append(len(blocks))
    return found


def assert_idle(engine: Engine) -> None:
    """Nothing is held, nothing is evicted, books agree."""
    assert not engine.scheduler.requests
    assert engine.pool.get_num_free_blocks() == engine.num_usable_blocks
    for manager in managers(engine):
        assert not manager.evicted and not manager.held_blocks()
    assert not engine.scheduler.planner.requests and not engine.scheduler.query_slots.owned
    engine.scheduler.check_integrity()
    engine.step()  # the worker hears of finished requests with the next step
    state = engine.runner.model_state
    assert not state.window._stashes and not state.request_configs and not state._rows
    assert not state.prompt_queries._summaries and not state.setups
    assert (state.ring._slot_of_row == -1).all()
    assert not state.lengths.evicted.np.any()
    books = feature_of(engine, CodebookFeature).books
    assert not books._sizes.np.any() and not books.rows


@pytest.fixture(scope="session")
def tokenize(probe_model: str) -> Callable[[str], list[int]]:
    """The probe model's tokenizer, as the server applies it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(probe_model).encode


@pytest.fixture(scope="session")
def samples(tokenize: Callable[[str], list[int]]) -> list[NeedleSample]:
    """Ten prompts of ~1,500 tokens, needles from the first sentence to the last."""
    return make_samples(10, 1500, tokenize, seed=11)


@pytest.fixture(scope="session")
def prompts(samples: list[NeedleSample], tokenize: Callable[[str], list[int]]) -> list[list[int]]:
    """Token ids of `samples`."""
    return [tokenize(sample.prompt) for sample in samples]


@pytest.fixture(scope="session")
def stock_tokens(probe_model: str, prompts: list[list[int]]) -> list[list[int]]:
    """16 greedy tokens of stock vLLM for every prompt of `prompts`."""
    with opened(probe_model, None) as engine:
        return engine.generate(prompts, 16, ignore_eos=True)

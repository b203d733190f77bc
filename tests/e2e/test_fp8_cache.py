"""Engines whose cache has 8 bits: whole, evicted, and read by drafts.

Layers get scales other than 1, as a checkpoint would give them. What is evicted is held against
scores in float64 over the engine's own bytes, unpacked and decoded here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lab.random_models import distinct_tokens, write_random_model
from tests.e2e.conftest import assert_idle, opened, serving
from tests.e2e.eight_bits import give_scales, needs_eight_bits
from vllm_kvcompress.core.report import savings_line
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.plans import GroupPlan

pytestmark = [pytest.mark.engine, needs_eight_bits]

BLOCK, NUM_TOKENS, WINDOW = 32, 16, 16
SCALES = {"_k_scale_float": 0.037, "_v_scale_float": 0.021}
EVICT: dict[str, Any] = {
    "policy": {"name": "snapkv", "kernel_size": 1},
    "observation_window": WINDOW,
    "budget": {"ratio": 0.25, "floor": 1},
    "min_prompt_len": 64,
}
DRAFT = {**EVICT, "mode": "draft", "draft": {"tokens": 3}}
ENGINE: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 160,
    "block_size": BLOCK,
    "kv_cache_dtype": "fp8",
}
PROMPTS = [distinct_tokens(count, seed) for seed, count in enumerate((500, 333, 401))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_random_model(tmp_path_factory.mktemp("llama"), "llama"))


@pytest.fixture(scope="module")
def stock(model: str) -> list[list[int]]:
    """Tokens of stock vLLM over such a cache."""
    with opened(model, None, **ENGINE) as engine:
        give_scales(engine, SCALES)
        return engine.generate(PROMPTS, NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(model: str, stock: list[list[int]]) -> Iterator[Engine]:
    with opened(model, DRAFT, **ENGINE) as engine:
        give_scales(engine, SCALES)
        yield engine


def test_nothing_evicted_is_stock(engine: Engine, stock: list[list[int]]) -> None:
    with serving(engine, EVICT):
        for xargs in ({"kv_compression": "none"}, {"kv_budget_ratio": 1.0}):
            assert engine.generate(PROMPTS, NUM_TOKENS, xargs, ignore_eos=True) == stock
    assert_idle(engine)


@pytest.mark.parametrize("policy", ["snapkv", "keydiff", "random"])
def test_drafts_are_lossless(engine: Engine, stock: list[list[int]], policy: str) -> None:
    views, steps = engine.scheduler.stats.views, engine.num_steps
    with serving(engine, {**DRAFT, "policy": {"name": policy}}):
        assert engine.generate(PROMPTS, NUM_TOKENS, ignore_eos=True) == stock
    assert views[f"{policy}/prompt"] == len(PROMPTS)
    assert engine.num_steps - steps < NUM_TOKENS + 8
    assert_idle(engine)


@dataclass
class Moved:
    """What one compaction found and left in one layer: the cache's bytes, and the queries."""

    plan: GroupPlan
    source: torch.Tensor  # [blocks, KV, BLOCK, 2 D] uint8
    destination: torch.Tensor
    queries: torch.Tensor  # [H, WINDOW, D]
    scale: float


def watch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Moved]:
    compactor, window = engine.runner.compactor, engine.runner.model_state.window
    original, found = compactor.run, list[Moved]()

    def run(jobs: Any) -> None:
        begun = []
        for job in jobs:
            for layer in compactor.layers:
                plan = job.plan.groups[layer.group]
                blocks = torch.tensor(plan.source_blocks + plan.tail_blocks)
                queries = window.take(job.plan.request_id, layer.name, job.plan.position).clone()
                begun.append((layer, plan, layer.cache()[blocks].clone(), queries))
        original(jobs)
        for layer, plan, source, queries in begun:
            destination = layer.cache()[torch.tensor(plan.destination_blocks)].clone()
            found.append(Moved(plan, source, destination, queries, layer.scale))

    monkeypatch.setattr(compactor, "run", run)
    return found


def rows(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of keys and values [KV, n, D]; of a key, those of all tokens of its block follow."""
    halves = blocks.flatten(2).unflatten(2, (2, -1))  # [b, KV, 2, BLOCK * D]
    keys = halves[:, :, 0].unflatten(2, (-1, BLOCK)).transpose(2, 3)
    values = halves[:, :, 1].unflatten(2, (BLOCK, -1))
    return keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)


def survivors(moved: Moved) -> list[list[int]]:
    """Of each KV head: sinks, the window, and the best by mean attention, in float64."""
    lengths, length = moved.plan.lengths, moved.plan.cache.num_tokens
    keys = rows(moved.source)[0][:, :length].contiguous().view(torch.float8_e4m3fn).double()
    keys = keys * SCALES["_k_scale_float"]
    forced = {index for start, end in moved.plan.forced for index in range(start, end)}
    queries = moved.queries.double().unflatten(0, (len(keys), -1))  # [KV, g, w, D]
    chosen = []
    for own, asked in zip(keys, queries, strict=True):
        logits = torch.einsum("gwd,nd->gwn", asked, own) * moved.scale
        last = torch.arange(length - WINDOW, length)
        logits = logits.masked_fill(torch.arange(length) > last[:, None], float("-inf"))
        scores = logits.softmax(-1).mean((0, 1)).tolist()
        order = sorted(range(lengths.region_len), key=lambda i: (i not in forced, -scores[i]))
        chosen.append(sorted(order[: lengths.kept_len]))
    return chosen


def test_what_stays_is_the_best_by_scaled_scores_bit_for_bit(
    engine: Engine, stock: list[list[int]], monkeypatch
) -> None:
    moved = watch(engine, monkeypatch)
    with serving(engine, EVICT):
        found = engine.generate(PROMPTS, NUM_TOKENS, ignore_eos=True)
        assert all(one != other for one, other in zip(found, stock, strict=True))
        again = engine.generate(PROMPTS, NUM_TOKENS, ignore_eos=True, name="hit")
        assert again == found, "over blocks of the prefix cache"
    assert_idle(engine)
    assert len(moved) == 2 * len(PROMPTS) * len(engine.runner.compactor.layers)
    unscaled = 0
    for each in moved:
        chosen = survivors(each)
        for source, kept in zip(rows(each.source), rows(each.destination), strict=True):
            for head, indices in enumerate(chosen):
                assert torch.equal(kept[head], source[head, indices])
        with monkeypatch.context() as patched:
            patched.setitem(SCALES, "_k_scale_float", 1.0)
            unscaled += survivors(each) != chosen
    assert unscaled > len(moved) / 2, "without the scale others would stay"


def test_the_line_at_start_up(engine: Engine) -> None:
    with serving(engine, EVICT):
        config = engine.scheduler.planner.config
        line = savings_line(config, engine.scheduler.kv_cache_config, 1024)
    assert ", cache of 8 bits, " in line
    assert "keeps 8 of 32 blocks" in line and "12% of the bytes of a whole cache of 16 bits" in line

"""The compactor on paged caches: Triton kernels in place against copies in plain torch.

The same requests are compacted twice, on the GPU's strided layout and on the CPU's packed one. The
first goes through every kernel, ragged batches and all; the second gathers rows and is what the
engine tests hold against Hugging Face and kvpress.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.paged import DEVICE, make_cache
from tests.policies.cases import CASES
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.kernels import select_tokens
from vllm_kvcompress.kernels.cache_rows import DenseRows
from vllm_kvcompress.kernels.rotary import Rotary
from vllm_kvcompress.plans import CompactionPlan, GroupCache, GroupLengths, GroupPlan, Purpose
from vllm_kvcompress.policies.inputs import ChunkInputs, Queries
from vllm_kvcompress.worker.batch import CompactionJob
from vllm_kvcompress.worker.compaction.compactor import Compactor, QuerySources
from vllm_kvcompress.worker.compaction.warm_up import warm_up
from vllm_kvcompress.worker.draft.linked_blocks import choose_blocks
from vllm_kvcompress.worker.layout.base import CacheLayout
from vllm_kvcompress.worker.layout.layer_cache import LayerCache
from vllm_kvcompress.worker.layout.packed import VectorLayout
from vllm_kvcompress.worker.layout.strided import StridedLayout

BLOCK, HEADS, KV, DIM, LAYERS, WINDOW = 32, 4, 2, 32, 4, 8
LENGTHS = {"a": 200, "b": 97, "c": 161}
ROTARY = Rotary(10000.0 ** (-torch.arange(DIM // 2, device=DEVICE) / (DIM // 2)), is_neox=True)
EVERY = [(name, params) for name, rows in CASES.items() for params in rows]


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def rows_of(name: str, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values [KV, n, D] and queries [H, n, D] of a request's prompt in one layer."""
    length, seed = LENGTHS[name], 100 * layer + ord(name)
    keys, values = noise(KV, length, DIM, seed=seed), noise(KV, length, DIM, seed=seed + 1000)
    return keys, values, noise(HEADS, length, DIM, seed=seed + 2000)


class Sources:
    """Stands for the three places queries come from."""

    def __init__(self, config: CompressionConfig) -> None:
        self.config = config

    def take(self, name: Any, layer: str, *position: int) -> Any:
        """The window's queries [H, w, D], or the policy's summary of all."""
        name = name if isinstance(name, str) else list(LENGTHS)[name]
        keys, values, queries = rows_of(name, int(layer))
        policy = self.config.build_policy()
        if policy.queries is not Queries.PROMPT or position:
            return (
                queries[:, -self.config.observation_window :]
                .transpose(0, 1)
                .contiguous()
                .transpose(0, 1)
            )
        rows = DenseRows(keys, values, queries, DIM**-0.5)
        return policy.accumulate(None, ChunkInputs(rows, 0, LENGTHS[name], 4, ROTARY))


class World:
    """Caches of two groups of two layers, filled with the same requests whatever the layout."""

    def __init__(self, layout: CacheLayout, caches: list[torch.Tensor], ratio: int = 1) -> None:
        self.layout, self.caches = layout, caches
        self.blocks: dict[str, list[int]] = {}
        free = iter(torch.randperm(64, generator=torch.Generator().manual_seed(5)).tolist())
        for name, length in LENGTHS.items():
            self.blocks[name] = [next(free) for _ in range(-(-length // BLOCK))]
        self.free = list(free)

    def fill(self) -> None:
        for layer, cache in enumerate(self.caches):
            for name, length in LENGTHS.items():
                keys, values, _ = rows_of(name, layer)
                padding = (0, 0, 0, -length % BLOCK)
                pad = torch.nn.functional.pad
                blocks = torch.tensor(self.blocks[name], device=DEVICE)
                self.layout.write(cache, blocks, pad(keys, padding), pad(values, padding))

    def plan(self, name: str, kept: list[int], pins: tuple = ()):
        """Keep so many tokens in each group; the region is all full blocks."""
        length = LENGTHS[name]
        region = length // BLOCK * BLOCK
        permanent = ((0, 4), *pins)
        forced = (*permanent, (length - WINDOW, length))
        groups = []
        for count in kept:
            if count >= region:
                groups.append(None)
                continue
            targets = tuple(self.free.pop(0) for _ in range(count // BLOCK))
            source = tuple(self.blocks[name])
            split = region // BLOCK
            groups.append(
                GroupPlan(
                    GroupLengths(region, count),
                    GroupCache(length, permanent),
                    tuple((s, min(e, region)) for s, e in forced if s < region),
                    source[:split],
                    targets,
                    source[split:],
                )
            )
        return CompactionPlan(name, length, False, 7, tuple(groups))

    def compactor(self, config: CompressionConfig) -> Compactor:
        queries = Sources(config)
        return Compactor(
            layers=[
                LayerCache(
                    name=str(index),
                    index=index,
                    group=index // 2,
                    scale=DIM**-0.5,
                    layout=self.layout,
                    cache=lambda index=index: self.caches[index],
                    rotary=ROTARY,
                    output_projection=lambda: noise(HEADS, 48, DIM, seed=1),
                )
                for index in range(LAYERS)
            ],
            num_layers=LAYERS,
            sources=QuerySources(queries, queries, queries),  # type: ignore[arg-type]
            device=torch.device(DEVICE),
            all_reduce=lambda tensor: tensor,
            num_ranks=1,
            first_kv_head=0,
        )

    def survivors(self, plans: list[CompactionPlan]) -> dict[tuple, tuple]:
        """Keys and values in every destination."""
        found = {}
        for plan in plans:
            for layer, cache in enumerate(self.caches):
                group = plan.groups[layer // 2]
                if group is not None:
                    blocks = torch.tensor(group.destination_blocks, device=DEVICE)
                    found[plan.request_id, layer] = self.layout.read(cache, blocks)
        return found


def strided_world(layout: str = "LBHNC", kernel_block: int = BLOCK) -> World:
    ratio = BLOCK // kernel_block
    caches = make_cache(64 * ratio, KV, kernel_block, 2 * DIM, torch.float32, layout, LAYERS)
    world = World(StridedLayout(DIM, BLOCK), caches)
    world.fill()
    return world


def packed_world() -> World:
    caches = [torch.full((64, KV, BLOCK, 2 * DIM), float("nan")).to(DEVICE) for _ in range(LAYERS)]
    world = World(VectorLayout(DIM), caches)
    world.fill()
    return world


def compact(
    world: World, settings: dict[str, dict], triton: bool, decoding: str = "", **plan: Any
) -> dict:
    """Compact all three requests, each under its setting, in one call; some while decoding."""
    configs = {
        name: parse_config(
            {
                "observation_window": WINDOW,
                "min_prompt_len": 0,
                "num_sink_tokens": 4,
                "budget": {"ratio": 0.5},
                **setting,
            }
        )
        for name, setting in settings.items()
    }
    kept = {"a": [64, 96], "b": [32, 96], "c": [96, 64]}  # b leaves its second group alone
    plans = [
        replace(world.plan(name, kept[name], **plan), while_decoding=name in decoding)
        for name in LENGTHS
    ]
    jobs = [CompactionJob(each, configs[each.request_id], row) for row, each in enumerate(plans)]
    compactor = world.compactor(configs["a"])
    if triton:
        compactor.select_tokens = select_tokens.select_tokens
    compactor.run(jobs)
    return world.survivors(plans)


def check_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys() and len(one) == 10
    for place, rows in one.items():
        for found, expected in zip(rows, other[place], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=str(place))


def same_for_all(policy: dict[str, Any], **more: Any) -> dict[str, dict]:
    return dict.fromkeys(LENGTHS, {"policy": policy, **more})


@pytest.mark.parametrize(("name", "params"), EVERY)
def test_every_policy_keeps_the_same_rows_in_place_and_in_copies(name: str, params: dict) -> None:
    settings = same_for_all({"name": name, **params})
    check_equal(
        compact(strided_world(), settings, triton=True),
        compact(packed_world(), settings, triton=False),
    )


@pytest.mark.parametrize("layout", ["LBNHC", "BHLNC"])
def test_blocks_that_the_kernels_of_the_host_cut_in_two(layout: str) -> None:
    settings = same_for_all({"name": "snapkv"})
    check_equal(
        compact(strided_world(layout, BLOCK // 2), settings, triton=True),
        compact(packed_world(), settings, triton=False),
    )


def test_requests_under_different_policies_in_one_step() -> None:
    settings = {
        "a": {"policy": {"name": "snapkv"}},
        "b": {"policy": {"name": "keydiff"}},
        "c": {"policy": {"name": "streaming_llm", "rerotate_keys": True}},
    }
    check_equal(
        compact(strided_world(), settings, triton=True),
        compact(packed_world(), settings, triton=False),
    )


def test_pins_go_to_the_front_while_decoding_too() -> None:
    settings = same_for_all({"name": "snapkv"})
    pins = ((40, 50), (70, 72))
    one = compact(strided_world(), settings, triton=True, pins=pins, decoding="abc")
    check_equal(one, compact(packed_world(), settings, triton=False, pins=pins, decoding="abc"))
    keys, _, _ = rows_of("a", 0)
    first = torch.cat([keys[:, 0:4], keys[:, 40:50], keys[:, 70:72]], dim=1)
    assert torch.equal(one["a", 0][0][:, :16], first)


def test_prompts_that_end_beside_requests_that_decode() -> None:
    """Regression: the one kind brings no queries, the other does; they must not share a launch."""
    settings = same_for_all({"name": "expected_attention"})
    one = compact(strided_world(), settings, triton=True, decoding="b")
    check_equal(one, compact(packed_world(), settings, triton=False, decoding="b"))


def test_a_view_and_an_eviction_of_one_request() -> None:
    """Regression: AdaKV's scores depend on how many tokens are kept."""
    found = {}
    for together in (True, False):
        world = packed_world()
        config = parse_config({"policy": {"name": "adakv"}, "budget": {"ratio": 0.5},
                               "observation_window": WINDOW})  # fmt: skip
        plans = [
            replace(world.plan("a", [32, 32]), purpose=Purpose.COPIED_VIEW),
            world.plan("a", [96, 96]),
        ]
        jobs = [CompactionJob(each, config, 0) for each in plans]
        compactor = world.compactor(config)
        for some in [jobs] if together else [[job] for job in jobs]:
            compactor.run(some)
        found[together] = [rows for plan in plans for rows in world.survivors([plan])["a", 0]]
    for one, other in zip(found[True], found[False], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
def test_linked_views_are_the_best_whole_blocks(triton: bool) -> None:
    """By hand: mean attention per block over heads, sinks' and pins' blocks first, in order."""
    world = strided_world() if triton else packed_world()
    config = parse_config({"policy": {"name": "windowkv", "window_size": BLOCK},
                           "budget": {"ratio": 0.5}, "observation_window": WINDOW,
                           "layer_groups": {"count": 2}})  # fmt: skip
    plans = [world.plan(name, [64, 64], pins=((70, 75),)) for name in ("a", "c")]
    compactor = world.compactor(config)
    if triton:
        compactor.select_tokens = select_tokens.select_tokens
    jobs = [CompactionJob(replace(each, purpose=Purpose.LINKED_VIEW), config, 0) for each in plans]
    chosen = choose_blocks(compactor, jobs)
    assert chosen.keys() == {(name, group) for name in ("a", "c") for group in range(2)}
    for (name, group), blocks in chosen.items():
        keys, _, queries = rows_of(name, 2 * group)
        length = LENGTHS[name]
        scores = torch.zeros(length, dtype=torch.float64)
        for head in range(HEADS):
            for i in range(length - WINDOW, length):
                logits = keys[head // 2, : i + 1].double() @ queries[head, i].double() * DIM**-0.5
                scores[: i + 1] += logits.softmax(0).cpu()
        review = scores[: length - WINDOW]
        num_blocks = length // BLOCK
        means = [float(part.mean()) for part in review.split(BLOCK)][:num_blocks]
        order = sorted(range(num_blocks), key=lambda b: (b not in (0, 2), -means[b]))
        expected = [world.blocks[name][b] for b in sorted(order[:2])]
        assert blocks.tolist() == expected, (name, group)


def test_more_tokens_than_fit_at_once_are_compacted_in_turns(monkeypatch) -> None:
    settings = same_for_all({"name": "windowkv"})
    expected = compact(strided_world(), settings, triton=True)
    monkeypatch.setattr("vllm_kvcompress.worker.compaction.compactor.MAX_TOKENS", 250)
    check_equal(compact(strided_world(), settings, triton=True), expected)


def test_one_launch_scores_all_requests_and_one_copies_all_layers(monkeypatch) -> None:
    """Launches do not multiply with requests: 2 groups copy, 4 layers score, for 3 requests."""
    from vllm_kvcompress.kernels import paged_rows
    from vllm_kvcompress.worker.layout import strided as layout

    counts = {"score": [], "copy": []}
    score, copy = paged_rows.token_scores, layout.compact_pages
    monkeypatch.setattr(
        paged_rows,
        "token_scores",
        lambda queries, *a: counts["score"].append(len(queries)) or score(queries, *a),
    )
    monkeypatch.setattr(
        layout,
        "compact_pages",
        lambda layers, *a, **k: counts["copy"].append(len(layers.caches)) or copy(layers, *a, **k),
    )
    compact(strided_world(), same_for_all({"name": "snapkv"}), triton=True)
    assert counts == {"score": [3, 3, 2, 2], "copy": [2, 2]}


@pytest.mark.parametrize("name", ["snapkv", "h2o", "keydiff"])
def test_warming_up_touches_the_null_block_alone(name: str) -> None:
    world = strided_world()
    before = [cache.clone() for cache in world.caches]
    config = parse_config({"policy": {"name": name}, "budget": {"ratio": 0.5}})
    compactor = world.compactor(config)
    compactor.select_tokens = select_tokens.select_tokens
    sample = torch.zeros(HEADS, DIM, device=DEVICE)
    warm_up(compactor, [config], BLOCK, {layer.name: sample for layer in compactor.layers})
    for now, then in zip(world.caches, before, strict=True):
        assert torch.equal(now[1:].nan_to_num(7.0), then[1:].nan_to_num(7.0))
    assert isinstance(compactor.sources.window, Sources), "the real sources are back"


def test_other_blocks_stay_as_they_are() -> None:
    world = strided_world()
    before = [cache.clone() for cache in world.caches]
    compact(world, same_for_all({"name": "keydiff"}), triton=True)
    for layer, (now, then) in enumerate(zip(world.caches, before, strict=True)):
        changed = (now != then) & ~(now.isnan() & then.isnan())
        blocks = {int(block) for block in changed.flatten(1).any(dim=1).nonzero()}
        assert len(blocks) == (6 if layer < 2 else 5), "destinations alone"

"""Requests with codebooks, watched step by step: what each holds whenever it was compacted."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.e2e.codes_by_hand import Coded, Vectors, cosines, decode, rotated
from tests.e2e.conftest import assert_idle
from tests.inside import managers, pending, preempt
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.replay import Prefilled
from vllm_kvcompress.plans import BookLengths

BLOCK, LAYERS, HEADS = 32, 4, 2
NUM_TOKENS, INTERVAL = 14, 8
FULL, ODD = 408, 394
"""Tokens of prompts: 12 blocks, and a tail that one interval makes a block of; or does not."""

COMMON: dict[str, Any] = {
    "preset": "spindlekv",
    # Without pooling eviction loses answers, so that what a book changes can be seen in tokens.
    "policy": {"name": "spindlekv", "kernel_size": 1},
    "budget": {"ratio": 0.6, "floor": 1},
    "layer_budget": {"shape": "uniform"},
    "observation_window": 16,
    "interval": INTERVAL,
    "min_prompt_len": 128,
}
LOSSY = {**COMMON, "codebook": {"shallow": 1.0, "entries": 0.1}}
ROOMY = {**COMMON, "codebook": {"groups": [0, 1, 3], "entries": 0.7, "extend": False}}
# In the first layer the vectors of equal tokens are equal: a book of them loses nothing but what
# float16 rounds off the lengths.
EQUAL = {"groups": [0], "entries": 0.46, "key_threshold": 0.9999, "value_threshold": 0.9999}
LOSSLESS = {**COMMON, "budget": {"ratio": 1.0}, "codebook": EQUAL}
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}

PRESET = {"kv_compression": "spindlekv", "kv_budget_ratio": 0.5}

Kept = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Snapshot:
    """What one request holds right after a step that compacted it.

    Attributes
    ----------
    position : int
        Tokens whose keys are in the cache.
    num_generated : int
        Tokens it has said, the last of which is not in the cache yet.
    books : dict[int, tuple[BookLengths, Coded]]
        By layer, those that this step made or extended.
    added : dict[int, Kept]
        By layer, keys and values [KV, n, D] of the tokens an extension has coded, as they were.
    kept : list[Kept]
        By layer, keys and values [KV, n, D] that are read from now on.
    num_blocks : list[int]
        By layer.
    """

    position: int
    num_generated: int
    books: dict[int, tuple[BookLengths, Coded]] = field(default_factory=dict)
    added: dict[int, Kept] = field(default_factory=dict)
    kept: list[Kept] = field(default_factory=list)
    num_blocks: list[int] = field(default_factory=list)


def snapshot(engine: Engine, name: str, model: str) -> Snapshot:
    """Look at a request whose compaction has run and is not committed: old blocks are intact."""
    scheduler, request = engine.scheduler, engine.live()[name]
    caches = scheduler.planner.requests[request.request_id].compaction.caches
    seen = Snapshot(request.num_computed_tokens, request.num_output_tokens)
    for layer in engine.runner.compactor.layers:
        manager = managers(engine)[layer.group]
        blocks = [block.block_id for block in manager.req_to_blocks[request.request_id]]
        evicted = manager.evicted.get(request.request_id, 0)
        planned, book = pending(manager, request.request_id), caches[layer.group].book
        if planned is not None:
            lengths, first = planned.lengths, planned.lengths.region_len // BLOCK
            if lengths.coded_before:
                source = torch.tensor(blocks[lengths.held_before // BLOCK : first])
                seen.added[layer.index] = layer.layout.read(layer.cache(), source)
            blocks = [block.block_id for block in planned.destination] + blocks[first:]
            evicted, book = evicted + lengths.evicted, lengths.book
        num_slots = book.num_slots if book is not None else 0
        num_tail = seen.position - evicted - num_slots
        tail = torch.tensor(blocks[num_slots // BLOCK :], dtype=torch.int64)
        rows = [each[:, :num_tail] for each in layer.layout.read(layer.cache(), tail)]
        if book is not None:
            coded = decode(layer.cache(), blocks[: num_slots // BLOCK], book)
            if planned is not None:
                seen.books[layer.index] = book, coded
            keys = rotated(coded.keys.read(), coded.positions, model)
            both = zip((keys, coded.values.read()), rows, strict=True)
            rows = [torch.cat([torch.from_numpy(a).float(), b], dim=1) for a, b in both]
        seen.kept.append((rows[0], rows[1]))
        seen.num_blocks.append(len(blocks))
    return seen


@dataclass
class Run:
    """Requests that ran together.

    Attributes
    ----------
    tokens : dict[str, list[int]]
        What they said.
    snapshots : dict[str, list[Snapshot]]
        Of those that were compacted, in order.
    codebooks : dict[str, float]
        What the metrics counted meanwhile.
    blocks : dict[str, dict[int, list[int]]]
        By request and by its computed tokens: blocks held in each layer group.
    """

    tokens: dict[str, list[int]] = field(default_factory=dict)
    snapshots: dict[str, list[Snapshot]] = field(default_factory=dict)
    codebooks: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, dict[int, list[int]]] = field(default_factory=dict)


Request = tuple[list[int], int, dict[str, Any] | None]


def every_kind(prompts: list[list[int]]) -> dict[str, Request]:
    """Requests that are coded in whole, in part, under other presets, or not at all."""
    return {
        "full": (prompts[0], NUM_TOKENS, None),
        "odd": (prompts[3], NUM_TOKENS, None),
        "snapkv": (prompts[2], NUM_TOKENS, {"kv_compression": "snapkv", "kv_budget_ratio": 0.4}),
        # No block in common with another: shared blocks are not worth a compaction.
        "none": ([7, *prompts[0][1:]], NUM_TOKENS, {"kv_compression": "none"}),
        "short": (prompts[1][:100], NUM_TOKENS, None),
        # Other layers of it are coded than of the server's own requests.
        "preset": ((prompts[1] + prompts[2])[-560:], NUM_TOKENS, PRESET),
    }


def add(engine: Engine, requests: dict[str, Request]) -> None:
    for name, (prompt, max_tokens, xargs) in requests.items():
        engine.add(name, prompt, max_tokens, xargs, ignore_eos=True)


def run_all(engine: Engine, requests: dict[str, Request], model: str) -> Run:
    """Step requests to their end and look at each compaction."""
    before, done = dict(engine.scheduler.stats.codebooks), Run()
    add(engine, requests)
    while engine.engine.has_unfinished_requests():
        engine.step()
        engine.scheduler.check_integrity()
        for name, request in engine.live().items():
            held = [len(m.req_to_blocks[request.request_id]) for m in managers(engine)]
            done.blocks.setdefault(name, {})[request.num_computed_tokens] = held
            if engine.scheduler.compactions.is_planned(request.request_id):
                done.snapshots.setdefault(name, []).append(snapshot(engine, name, model))
    assert_idle(engine)
    done.tokens = {name: engine.results[name].token_ids for name in requests}
    after = engine.scheduler.stats.codebooks
    done.codebooks = {what: after[what] - before.get(what, 0) for what in after}
    return done


def check_vectors(found: Vectors, true: np.ndarray, num_entries: int, theta: float) -> int:
    """Every vector has its own length, and an entry above the threshold or else the nearest one.

    Entries in use are unit vectors, the slots behind them empty. Every entry is some token's
    direction, so those in use and those that exist are the same. Returns how many are not similar.
    """
    lengths = np.linalg.norm(true, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(found.read(), axis=-1), lengths, rtol=2**-11 + 1e-5)
    assert found.entries.shape[1] == num_entries
    own = cosines(found.read(), true)
    for head, (entries, index) in enumerate(zip(found.entries, found.index, strict=True)):
        count = index.max() + 1
        assert np.array_equal(np.unique(index), np.arange(count))
        np.testing.assert_allclose(np.linalg.norm(entries[:count], axis=-1), 1, rtol=1e-5)
        assert not entries[count:].any()
        nearest = (true[head] @ entries[:count].T / lengths[head][:, None]).max(axis=1)
        assert ((own[head] > theta - 1e-5) | (own[head] > nearest - 1e-5)).all()
    return int((own <= theta - 1e-5).sum())


def vectors_of(
    prompt: Prefilled, seen: list[Snapshot], layer: int, coded: Coded
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [KV, n, D] of the coded tokens, those of an extension from before it."""
    count = coded.positions.shape[1] - (seen[-1].added[layer][0].shape[1] if seen[1:] else 0)
    places = torch.from_numpy(coded.positions[:, :count])[..., None].expand(-1, -1, 64)
    both = []
    for number, whole in enumerate((prompt.keys, prompt.values)):
        parts = [whole[layer].gather(1, places)]
        parts += [seen[-1].added[layer][number]] if seen[1:] else []
        both.append(torch.cat(parts, dim=1).double().numpy())
    return both[0], both[1]


def rush(engine: Engine, prompts: list[list[int]]) -> None:
    """A coded request and a prompt fit the pool, and nothing beside them.

    So books overwrite what they code; besides, one request is preempted, and one is aborted between
    plan and commit.
    """
    stats, pool = engine.scheduler.stats, engine.pool
    deferrals, preemptions = stats.deferrals, engine.num_preemptions
    assert engine.scheduler.reset_prefix_cache(), "a prompt that is there takes no blocks"
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - LAYERS * (3 + 13) - 2)
    names = [f"rush-{number}" for number in range(4)]
    for name, prompt in zip(names, prompts, strict=True):
        engine.add(name, prompt, NUM_TOKENS, ignore_eos=True)
    victim, start = names[2], engine.num_steps
    while engine.engine.has_unfinished_requests():
        engine.step()
        assert engine.num_steps - start < 300, "nothing moves any more"
        engine.scheduler.check_integrity()
        request = engine.live().get(victim)
        if request is not None and engine.scheduler.compactions.is_planned(request.request_id):
            engine.abort(victim)
        last = engine.live().get(names[3])
        if engine.num_preemptions == preemptions and len(engine.results[names[3]].token_ids) > 1:
            preempt(engine, last)
    pool.free_blocks(taken)
    assert stats.deferrals == deferrals and engine.num_preemptions > preemptions
    assert [engine.results[name].finished for name in names] == [True, True, False, True]
    assert_idle(engine)


def count_by_hand(
    done: Run, prefilled: dict[str, Prefilled], model: str
) -> tuple[dict[str, float], dict[str, int]]:
    """What the metrics of a run should be, and vectors so near a threshold that rounding decides.

    Books are decoded as they are at the end: what is coded once stays.
    """
    counted = dict.fromkeys(done.codebooks, 0.0)
    unsure = {"key": 0, "value": 0}
    for name, seen in done.snapshots.items():
        for layer, (_, coded) in seen[-1].books.items():
            keys, values = vectors_of(prefilled[name], seen, layer, coded)
            found = rotated(coded.keys.read(), coded.positions, model)
            for kind, own, new, true, theta in (
                ("key", coded.keys, found, keys, 0.98),
                ("value", coded.values, coded.values.read(), values, 0.95),
            ):
                cos = cosines(new, true)
                unsure[kind] += int((abs(cos - theta) < 1e-5).sum())
                counted[f"{kind}/vectors"] += cos.size
                counted[f"{kind}/entries"] += sum(len(np.unique(row)) for row in own.index)
                counted[f"{kind}/forced"] += int((cos <= theta).sum())
                counted[f"{kind}/forced_distance"] += float((1 - cos)[cos <= theta].sum())
    return counted, unsure

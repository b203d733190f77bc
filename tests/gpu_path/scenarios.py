"""Requests that both backends serve: what they say, keep, find cached and cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.conftest import assert_idle, serving
from tests.inside import preempt
from vllm_kvcompress.config.reading import preset_names
from vllm_kvcompress.evaluation.engine import Engine

Prompts = Sequence[list[int]]

BLOCK, GROUPS, WINDOW = 32, 2, 16
ENGINE = {
    "kv_cache_memory_bytes": 24 << 20,  # the interpreter copies every storage it is shown
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 8,
    "block_size": BLOCK,
}
SMALL: dict[str, Any] = {
    "budget": {"tokens": 96, "floor": 1},
    "layer_groups": {"count": GROUPS},
    "min_prompt_len": 64,
}
DECODING = {
    "preset": "snapkv",
    **SMALL,
    "observation_window": WINDOW,
    "layer_budget": {"shape": "pyramid", "beta": 4},
    "trigger": "both",
    "interval": 32,
}
CODES = {
    "preset": "spindlekv",
    **SMALL,
    "budget": {"ratio": 0.6, "floor": 1},
    "layer_budget": {"shape": "uniform"},
    "codebook": {"shallow": 0.5, "entries": 0.3},
    "interval": 8,
}
VIEWS = {
    "preset": "snapkv",
    **SMALL,
    "budget": {"ratio": 0.3, "floor": 1},
    "mode": "draft",
    "draft": {"tokens": 4, "refresh_every": 16},
}
VIEWS_OF_EVICTED = {
    **VIEWS,
    "mode": "evict",
    "budget": {"tokens": 160, "floor": 1},
    "draft": {"tokens": 4, "budget": {"ratio": 0.3}},
}


@dataclass
class Said:
    """What requests ended with.

    Attributes
    ----------
    tokens : dict[str, list[int]]
        Generated tokens.
    cached : dict[str, int or None]
        Prompt tokens found in the prefix cache.
    counts : dict[str, int]
        Steps and preemptions. Steps tell how many drafts were accepted.
    """

    tokens: dict[str, list[int]] = field(default_factory=dict)
    cached: dict[str, int | None] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


Scenario = Callable[[Engine, Prompts], Said]
TURNED_ALONE = "turned alone"


def finish(engine: Engine, names: Sequence[str]) -> Said:
    """Run what was added to its end."""
    before = engine.num_preemptions
    steps = engine.drain()
    assert_idle(engine)
    counts = {"steps": steps, "preemptions": engine.num_preemptions - before}
    results = {name: engine.results[name] for name in names}
    return Said(
        {name: result.token_ids for name, result in results.items()},
        {name: result.num_cached_tokens for name, result in results.items()},
        counts,
    )


def policy_names() -> list[str]:
    """Presets that evict."""
    return [name for name in preset_names() if name not in ("auto", "spindlekv")]


def run_warm_up(engine: Engine, prompts: Prompts) -> Said:
    """What a GPU worker launches before the server takes requests.

    With codebooks the interpreter needs minutes; `tests/worker/test_compile_keys.py` has them.
    """
    engine.runner.warm_up_compaction()
    return Said()


def run_policies(engine: Engine, prompts: Prompts) -> Said:
    """Every preset, at the end of a prompt of its own; several policies in a step.

    The pool has not room for them all, so some are compacted in place. One that turns keys is alone
    before, and is not.
    """
    names = policy_names()
    turning = {"preset": "streaming_llm_rerotated", **SMALL, "trigger": "end_of_prompt"}
    with serving(engine, turning):
        engine.add(TURNED_ALONE, [5, *prompts[0][1:]], 5, ignore_eos=True)
        engine.drain()
    for number, name in enumerate(names):
        prompt = prompts[number % len(prompts)]
        own = [prompt[0], 7 + number, *prompt[2:]]  # no block in common with another
        setting = {"preset": name, **SMALL, "trigger": "end_of_prompt"}
        if name == "h2o":  # every token asks every other: minutes in the interpreter
            own, setting["budget"] = own[:80], {"tokens": 48, "floor": 1}
        with serving(engine, setting):
            engine.add(name, own, 5, ignore_eos=True)
    return finish(engine, [*names, TURNED_ALONE])


def run_options(engine: Engine, prompts: Prompts) -> Said:
    """What a request may ask for, unequal lengths, one left alone, in one batch."""
    asked: dict[str, tuple[list[int], dict[str, Any] | None]] = {
        "pinned": (prompts[0], {"kv_pin": [70, 90, 120, 121]}),
        "short": (prompts[1][:70], None),
        "none": (prompts[2], {"kv_compression": "none"}),
        "budget": (prompts[3], {"kv_budget_tokens": 64}),
        "one token": (prompts[0][:1], None),
    }
    for name, (prompt, xargs) in asked.items():
        engine.add(name, prompt, 6, xargs, ignore_eos=True)
    return finish(engine, list(asked))


def run_decoding(engine: Engine, prompts: Prompts) -> Said:
    """Compactions every 32 generated tokens, with queries of the ring."""
    engine.add("long", prompts[0], 72, ignore_eos=True)
    engine.add("short", prompts[1][:40], 72, ignore_eos=True)
    return finish(engine, ["long", "short"])


def run_rkv(engine: Engine, prompts: Prompts) -> Said:
    """R-KV evicts while decoding only, by attention and repetition."""
    setting = {"preset": "rkv", **SMALL, "min_prompt_len": 0, "trigger": "interval", "interval": 32}
    with serving(engine, setting):
        engine.add("rkv decoding", prompts[2], 40, ignore_eos=True)
        return finish(engine, ["rkv decoding"])


def run_codebooks(engine: Engine, prompts: Prompts) -> Said:
    """Books made at the end of prompts, read, and extended every 8 tokens; a plain row beside."""
    with serving(engine, CODES):
        # 26 tokens behind the last block: one interval later that is a block to code.
        engine.add("coded", prompts[0][-154:], 12, ignore_eos=True)
        engine.add("coded too", prompts[1][-122:], 12, ignore_eos=True)
        engine.add("plain", prompts[2][-90:], 12, {"kv_compression": "none"}, ignore_eos=True)
        return finish(engine, ["coded", "coded too", "plain"])


def run_prefix_hits(engine: Engine, prompts: Prompts) -> Said:
    """The second of two equal prompts, and a longer one, find the blocks the first has left."""
    base = [9, *prompts[4][1:]]
    engine.add("first", base, 6, ignore_eos=True)
    first = finish(engine, ["first"])
    engine.add("again", base, 6, ignore_eos=True)
    engine.add("longer", base + prompts[3][:60], 6, ignore_eos=True)
    said = finish(engine, ["again", "longer"])
    said.tokens |= first.tokens
    said.cached |= first.cached
    return said


def run_preemption(engine: Engine, prompts: Prompts) -> Said:
    """A request that was compacted twice loses everything and starts again."""
    engine.add("preempted", [11, *prompts[0][1:]], 48, ignore_eos=True)
    engine.add("beside", [12, *prompts[1][1:]], 48, ignore_eos=True)
    for _ in range(40):
        engine.step()
    request = engine.live()["preempted"]
    assert request.num_output_tokens > 33, "two compactions are to be repeated"
    preempt(engine, request)
    said = finish(engine, ["preempted", "beside"])
    assert engine.num_preemptions > 0
    return said


def run_inside_prompts(engine: Engine, prompts: Prompts) -> Said:
    """Compactions every 56 tokens of a prompt, whose chunks read what the earlier ones left."""
    inside = {**DECODING, "trigger": "all", "prompt_interval": 56}
    with serving(engine, inside):
        engine.add("inside", [17, *prompts[0][1:]], 40, ignore_eos=True)
        engine.add("inside too", [19, *prompts[1][1:180]], 8, ignore_eos=True)
        return finish(engine, ["inside", "inside too"])


def run_small_pool(engine: Engine, prompts: Prompts) -> Said:
    """More than the pool holds: requests wait, are preempted and come back."""
    names = [f"crowd {number}" for number in range(5)]
    for number, name in enumerate(names):
        prompt = [13 + number, *prompts[number][1:]]
        xargs = {"kv_compression": "none"} if number % 2 == 0 else None
        engine.add(name, prompt, 40, xargs, ignore_eos=True)
    return finish(engine, names)


EVICT: dict[str, Scenario] = {
    "warm-up": run_warm_up,
    "policies": run_policies,
    "options": run_options,
    "decoding": run_decoding,
    "rkv": run_rkv,
    "codebooks": run_codebooks,
    "prefix hits": run_prefix_hits,
    "preemption": run_preemption,
    "inside prompts": run_inside_prompts,
    "small pool": run_small_pool,
}


def run_copied_views(engine: Engine, prompts: Prompts) -> Said:
    """Views that are copies, renewed every 16 tokens."""
    engine.add("copied", prompts[0], 40, ignore_eos=True)
    engine.add("too short", prompts[1][:50], 12, ignore_eos=True)
    return finish(engine, ["copied", "too short"])


def run_linked_views(engine: Engine, prompts: Prompts) -> Said:
    """Views of the requests' own blocks, chosen on the device."""
    with serving(engine, {**VIEWS, "preset": "windowkv_qwen2.5"}):
        engine.add("linked", prompts[2], 24, ignore_eos=True)
        engine.add("linked too", prompts[3], 24, ignore_eos=True)
        return finish(engine, ["linked", "linked too"])


def run_views_of_evicted(engine: Engine, prompts: Prompts) -> Said:
    """The target's cache is evicted, and drafts read still less of it."""
    with serving(engine, VIEWS_OF_EVICTED):
        engine.add("evicted", [15, *prompts[4][1:]], 24, ignore_eos=True)
        return finish(engine, ["evicted"])


DRAFT: dict[str, Scenario] = {
    "copied views": run_copied_views,
    "linked views": run_linked_views,
    "views of an evicted cache": run_views_of_evicted,
}

"""Prompts larger than the pool: what is held, what is answered, and what stock vLLM says."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.tasks.needle import NeedleSample, is_right, make_samples

DIGITS = 7
BLOCK = 32
POOL = 94
"""Blocks: 93 that are handed out hold 2,976 tokens."""
LENGTH = 8000
INTERVAL = 1024
POLICIES = ("snapkv", "windowkv", "tova", "keydiff")


def setting(policy: str, trigger: str) -> dict[str, Any]:
    """Of a server that keeps 12 % of a prompt in one layer group."""
    inside = {"prompt_interval": INTERVAL} if trigger == "prompt" else {}
    task = {"task": "localization"} if policy == "windowkv" else {}
    return {
        "preset": policy,
        "trigger": trigger,
        "budget": {"ratio": 0.12},
        "layer_groups": {"count": 1},
        "layer_budget": {"shape": "uniform"},
        **inside,
        **task,
    }


@dataclass(frozen=True)
class LongRow:
    """How one server got through the prompts.

    Attributes
    ----------
    right, total : int
        Exact answers.
    most_held : int
        Blocks in use at once at most.
    deferrals, preemptions : int
        Of all requests.
    """

    right: int
    total: int
    most_held: int
    deferrals: int
    preemptions: int


@contextmanager
def opened(model: str, given: Any, num_blocks: int | None) -> Iterator[Engine]:
    """An engine, closed in the end."""
    engine = Engine(model, given, num_blocks=num_blocks, kv_cache_memory_bytes=1 << 30)
    try:
        yield engine
    finally:
        engine.close()


def stock_refusal(model: str) -> str:
    """What stock vLLM says of a pool of `POOL` blocks; empty if it starts."""
    try:
        with opened(model, None, POOL):
            return ""
    except ValueError as error:
        return str(error).split(". ")[0]


def serve(engine: Engine, samples: Sequence[NeedleSample], at_once: int = 1) -> LongRow:
    """Ask about every prompt, so many at once."""
    right = most = 0
    for first in range(0, len(samples), at_once):
        names = []
        for index, sample in enumerate(samples[first : first + at_once]):
            names.append(f"long-{first + index}")
            engine.add(names[-1], engine.tokenize(sample.prompt), DIGITS + 1)
        while engine.engine.has_unfinished_requests():
            engine.step()
            most = max(most, engine.num_usable_blocks - engine.pool.get_num_free_blocks())
        for name, sample in zip(names, samples[first:], strict=False):
            answer = engine.decode(engine.results[name].token_ids).strip()
            right += is_right(answer, sample.answer)
    stats = getattr(engine.scheduler, "stats", None)
    deferrals = stats.deferrals if stats else 0
    return LongRow(right, len(samples), most, deferrals, engine.num_preemptions)


def show_long(model: str, num_samples: int) -> bool:
    """Print the table; False if a prompt did not fit, waited or was preempted."""
    refusal = stock_refusal(model)
    print(f"stock, {POOL} blocks of {BLOCK} tokens: {refusal or 'starts'}")
    with opened(model, None, None) as engine:
        samples = make_samples(num_samples, LENGTH, engine.tokenize)
        whole = serve(engine, samples)
    print(f"{'policy':12} {'pool':>6} {'trigger':14} {'right':>8} {'blocks':>7} {'deferrals':>10}")

    def line(policy: str, pool: str, trigger: str, row: LongRow) -> None:
        counts = f"{row.right:3} / {row.total:2} {row.most_held:7} {row.deferrals:10}"
        print(f"{policy:12} {pool:>6} {trigger:14} {counts}", flush=True)

    line("stock", "ample", "", whole)
    good = bool(refusal)
    for policy in POLICIES:
        with opened(model, setting(policy, "end_of_prompt"), None) as engine:
            line(policy, "ample", "end_of_prompt", serve(engine, samples))
        with opened(model, setting(policy, "prompt"), POOL) as engine:
            row = serve(engine, samples)
            line(policy, str(POOL), "prompt", row)
            good &= row.most_held < POOL and not row.deferrals and not row.preemptions
    return good

"""Whole-engine scenarios that return plain numbers: tests assert them, scripts print them."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.tasks.needle import (
    NeedleSample,
    is_right,
    make_samples,
    needle_token_span,
)

DIGITS = 7
SERVER = "server"
"""In place of a preset's name: the server's own setting."""


def needle_pins(engine: Engine, sample: NeedleSample) -> list[int]:
    """``kv_pin`` for the tokens of the sentence that holds the number."""
    encoded = engine.llm.get_tokenizer()(sample.prompt, return_offsets_mapping=True)
    return list(needle_token_span(sample.prompt, sample.needle, encoded["offset_mapping"]))


@dataclass(frozen=True)
class NeedleRow:
    """Exact answers of one setting: `right` of `total`, at `right_depths` (0 first, 1 last)."""

    num_tokens: int
    policy: str
    ratio: float
    pinned: bool
    right: int
    total: int
    right_depths: tuple[float, ...]


def needle_answers(
    engine: Engine,
    num_tokens: int,
    num_samples: int,
    policies: Sequence[str],
    ratios: Sequence[float],
    pinned_ratio: float | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> list[NeedleRow]:
    """Ask for hidden numbers under every policy and budget, through per-request options.

    All variants of one prompt run together; the prefix cache serves their common prompt.

    Parameters
    ----------
    engine : Engine
        An engine with compression switched on.
    num_tokens, num_samples, seed
        See `make_samples`.
    policies, ratios
        Presets (or `SERVER`), and shares of the prompt to keep. "none" is always run once.
    pinned_ratio : float or None
        If set, every policy runs once more at this ratio with the needle's sentence pinned.
    progress : callable
        Called with a line now and then.
    """
    samples = make_samples(num_samples, num_tokens, engine.tokenize, seed)
    variants: list[tuple[str, float, bool]] = [("none", 1.0, False)]
    variants += [(policy, ratio, False) for policy in policies for ratio in ratios]
    if pinned_ratio is not None:
        variants += [(policy, pinned_ratio, True) for policy in policies]
    answers: dict[tuple[str, float, bool], list[str]] = {variant: [] for variant in variants}
    for index, sample in enumerate(samples):
        prompt = engine.tokenize(sample.prompt)
        pins = needle_pins(engine, sample)
        xargs = []
        for policy, ratio, pinned in variants:
            extra: dict[str, Any] = {} if policy == SERVER else {"kv_compression": policy}
            if policy != "none":
                extra["kv_budget_ratio"] = ratio
            if pinned:
                extra["kv_pin"] = pins
            xargs.append(extra)
        # The first alone, so that the others find its blocks in the prefix cache.
        outputs = engine.generate([prompt], DIGITS + 1, xargs[:1], f"n{num_tokens}")
        outputs += engine.generate([prompt] * (len(xargs) - 1), DIGITS + 1, xargs[1:])
        for variant, tokens in zip(variants, outputs, strict=True):
            answers[variant].append(engine.decode(tokens).strip())
        progress(f"{num_tokens} tokens: {index + 1} of {num_samples} prompts")
    rows = []
    for (policy, ratio, pinned), found in answers.items():
        pairs = zip(samples, found, strict=True)
        depths = tuple(s.depth for s, text in pairs if is_right(text, s.answer))
        rows.append(NeedleRow(num_tokens, policy, ratio, pinned, len(depths), num_samples, depths))
    return rows


@dataclass(frozen=True)
class DrainReport:
    """How an engine got through a queue. `tokens` are the outputs, in request order."""

    steps: int
    preemptions: int
    tokens: list[list[int]]


def drain(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    xargs: Mapping[str, Any] | None = None,
) -> DrainReport:
    """Queue all prompts at once and step until all are answered in full."""
    steps, preemptions = engine.num_steps, engine.num_preemptions
    tokens = engine.generate(prompts, max_tokens, xargs, "drain", ignore_eos=True)
    return DrainReport(engine.num_steps - steps, engine.num_preemptions - preemptions, tokens)


@dataclass
class ChurnReport:
    """What happened to the requests of `churn`, and what was left behind."""

    finished: int = 0
    aborted_in_prefill: int = 0
    aborted_before_commit: int = 0
    aborted_in_decode: int = 0
    preempted: int = 0
    blocks_missing: int = 0
    evicted_left: int = 0


def churn(engine: Engine, num_requests: int, seed: int = 0) -> ChurnReport:
    """Mixed traffic with aborts at every stage, then count what did not come back.

    Books are checked after every step. Use a pool that is too small, so that preemption happens.
    """
    rng = random.Random(seed)
    report = ChurnReport()
    fates: dict[str, str] = {}
    before = engine.num_preemptions
    waiting = [f"churn-{index}" for index in range(num_requests)]
    while waiting or engine.engine.has_unfinished_requests():
        while waiting and len(engine.scheduler.requests) < 12:
            request_id = waiting.pop()
            length = rng.choice([40, 300, 700, 1100, 1100, 2100])
            prompt = [rng.randrange(3, 4000) for _ in range(length)]
            xargs = rng.choice([None, {"kv_compression": "keydiff"}, {"kv_compression": "none"}])
            fates[request_id] = rng.choice(["finish", "finish", "prefill", "commit", "decode"])
            engine.add(request_id, prompt, rng.choice([4, 30, 80]), xargs, ignore_eos=True)
        engine.step()
        engine.scheduler.check_integrity()
        _abort_some(engine, fates, report)
    engine.step()  # lets the worker hear of the last ones
    report.finished = sum(result.finished for key, result in engine.results.items() if key in fates)
    report.preempted = engine.num_preemptions - before
    report.blocks_missing = engine.num_usable_blocks - engine.pool.get_num_free_blocks()
    report.evicted_left = sum(len(m.evicted) + len(m._pending) for m in engine.scheduler._managers)
    return report


def _abort_some(engine: Engine, fates: dict[str, str], report: ChurnReport) -> None:
    for name, request in engine.live().items():
        fate = fates.get(name)
        in_prefill = 0 < request.num_computed_tokens < request.num_prompt_tokens
        if fate == "prefill" and in_prefill:
            report.aborted_in_prefill += 1
        elif fate == "commit" and engine.scheduler.compactions.is_planned(request.request_id):
            report.aborted_before_commit += 1
        elif fate == "decode" and request.num_output_tokens > 2:
            report.aborted_in_decode += 1
        else:
            continue
        engine.abort(name)

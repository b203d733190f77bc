"""Engines of ``scripts/bench_speculation.py``, timed pass by pass.

A `Meter` wraps the runner and the speculator of an engine.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from lab.serving.client import BenchError

STOCK, NGRAM, DRAFT = VARIANTS = ("none", "ngram", "draft")
"""Stock vLLM, stock vLLM with its ngram speculation, the plugin in draft mode."""

COUNTS = ("drafts", "draft_tokens", "accepted_tokens")
"""Ends of the names of vLLM's counters, and the metrics they become."""


@dataclass
class Pass:
    """One pass of the target model and what followed it in the same step.

    Attributes
    ----------
    start : Any
        Mark of `Meter.mark` before the pass.
    rows, num_drafts : int
        Requests; draft tokens verified.
    decodes : bool
        Whether every request was past its prompt.
    draft_start, draft_end : Any
        Marks around drafting; None without it.
    end : Any
        Mark after sampling and drafting.
    draft_steps : int
        Draft steps run.
    view_share : float
        Share of the prompt that draft steps read.
    """

    start: Any
    rows: int
    num_drafts: int
    decodes: bool
    draft_start: Any = None
    draft_end: Any = None
    end: Any = None
    draft_steps: int = 0
    view_share: float = math.nan


class Meter:
    """Times of passes and drafts of a running engine, by wrapping its runner and its speculator.

    On CUDA by events on the engine's stream, on CPU by the clock.

    Parameters
    ----------
    engine : Engine
        `evaluation.engine.Engine`; its runner is changed in place.
    on_gpu : bool
        Whether it runs on CUDA.
    prompt_len : int
        Tokens of each prompt, of which `Pass.view_share` is a share.
    has_views : bool
        Whether it drafts over views, so that draft steps and views can be counted.

    Attributes
    ----------
    passes : list[Pass]
        In the order they ran; clear it before a measurement.
    """

    def __init__(self, engine: Any, on_gpu: bool, prompt_len: int, has_views: bool) -> None:
        self.engine, self.on_gpu, self.prompt_len = engine, on_gpu, prompt_len
        self.has_views = has_views
        self.passes: list[Pass] = []
        runner = engine.runner
        runner.execute_model = self._started(runner.execute_model)
        runner.sample_tokens = self._ended(runner.sample_tokens)
        self.speculator = getattr(runner, "speculator", None)
        if self.speculator is not None:
            self.speculator.propose = self._proposed(self.speculator.propose)

    def mark(self) -> Any:
        """A point in time on the device."""
        if not self.on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, last: Any) -> float:
        """Seconds from one mark to another; the device must be done with both."""
        return first.elapsed_time(last) / 1e3 if self.on_gpu else last - first

    def _started(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def execute_model(output: Any, *args: Any, **kwargs: Any) -> Any:
            counts = output.num_scheduled_tokens
            requests = self.engine.scheduler.requests
            # Scheduling has added this step's tokens to the computed ones already.
            decodes = all(
                requests[name].num_computed_tokens - count >= requests[name].num_prompt_tokens
                for name, count in counts.items()
                if name in requests
            )
            if counts:
                drafts = sum(map(len, output.scheduled_spec_decode_tokens.values()))
                self.passes.append(Pass(self.mark(), len(counts), drafts, decodes))
            return original(output, *args, **kwargs)

        return execute_model

    def _ended(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def sample_tokens(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            if self.passes and self.passes[-1].end is None:
                self.passes[-1].end = self.mark()
            return found

        return sample_tokens

    def _proposed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def propose(batch: Any, *args: Any, **kwargs: Any) -> Any:
            current = self.passes[-1]
            current.draft_start = self.mark()
            found = original(batch, *args, **kwargs)
            current.draft_end = self.mark()
            if self.has_views:
                assert self.speculator is not None
                current.draft_steps = self.speculator.num_steps
                current.view_share = self._view_share(batch)
            return found

        return propose

    def _view_share(self, batch: Any) -> float:
        """Share of the prompt in the views of a batch, averaged over rows and groups."""
        assert self.speculator is not None
        views = self.speculator.state.views
        rows = batch.idx_mapping_np[: batch.num_reqs]
        rows = rows[views.exists[rows]]
        if not len(rows):
            return math.nan
        dropped = [views.num_dropped_np(g, rows).mean() for g in range(len(views.blocks))]
        return 1 - float(fmean(map(float, dropped))) / self.prompt_len

    def times(self, batch: int) -> dict[str, float]:
        """Medians over the steps in which the whole batch decodes, with drafts where it has any.

        A step lasts from the start of its pass to the start of the next one, host included.

        Parameters
        ----------
        batch : int
            Requests of the whole batch.

        Returns
        -------
        dict
            "full_steps" (count), "step_seconds" and "pass_seconds"; with drafting "draft_seconds";
            with views "draft_step_seconds" and "view_share" (a mean).
        """
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
        speculates = self.speculator is not None
        full = [
            (one, other)
            for one, other in zip(self.passes, self.passes[1:], strict=False)
            if one.rows == other.rows == batch
            and one.decodes
            and other.decodes
            # The first pass behind the prompt of an engine that speculates may have no drafts.
            and (one.num_drafts > 0) == speculates
        ]
        if not full:
            raise BenchError(
                f"--output-len: no two steps decoded all {batch} requests at once; raise it."
            )
        found = {
            "full_steps": float(len(full)),
            "step_seconds": median(self.between(a.start, b.start) for a, b in full),
            "pass_seconds": median(self.between(a.start, a.draft_start or a.end) for a, _ in full),
        }
        if speculates:
            drafting = [one for one, _ in full]
            each = [self.between(one.draft_start, one.draft_end) for one in drafting]
            found["draft_seconds"] = median(each)
            if self.has_views:
                steps = median(one.draft_steps for one in drafting)
                found["draft_step_seconds"] = found["draft_seconds"] / steps
                found["view_share"] = fmean(one.view_share for one in drafting)
        return found


def spec_counts(engine: Any) -> dict[str, float]:
    """vLLM's own counters of speculative decoding."""
    found = {m.name: getattr(m, "value", 0) for m in engine.llm.get_metrics()}
    return {name: float(found.get(f"vllm:spec_decode_num_{name}", 0)) for name in COUNTS}


def measure(
    meter: Meter, prompts: Sequence[Sequence[int]], output_len: int, num_drafts: int
) -> dict[str, Any]:
    """Decode a batch whose prompts are in the prefix cache; counts, times and tokens.

    Parameters
    ----------
    meter : Meter
        Of the engine to run.
    prompts : sequence of token ids, one per request
        Prefilled here, one by one.
    output_len : int
        Tokens each request generates.
    num_drafts : int
        Draft tokens per step, of an engine that drafts.

    Returns
    -------
    dict
        "metrics", named as in `speculation_report.UNITS`, and "tokens": one list per request.
    """
    engine = meter.engine
    # One request at a time, so the pool needs room for no more than the batch holds later.
    for number, prompt in enumerate(prompts):
        engine.generate([prompt], 1, name=f"prefill-{number}", ignore_eos=True)
    meter.passes.clear()
    before, name = spec_counts(engine), f"measured-{len(engine.results)}"
    ids = [f"{name}-{index}" for index in range(len(prompts))]
    for request_id, prompt in zip(ids, prompts, strict=True):
        engine.add(request_id, prompt, output_len, ignore_eos=True)
    results = [engine.results[request_id] for request_id in ids]
    lengths, started, first_tokens = [0] * len(ids), 0.0, 0
    request_steps = decode_tokens = engine_steps = 0
    while engine.engine.has_unfinished_requests():
        engine.step()
        grown = [len(r.token_ids) - old for r, old in zip(results, lengths, strict=True)]
        lengths = [len(r.token_ids) for r in results]
        if started:
            engine_steps += 1
        # A request's first tokens come with its prompt; what follows is decoding.
        decoding = [g for g, n in zip(grown, lengths, strict=True) if 0 < g < n]
        request_steps += len(decoding)
        decode_tokens += sum(decoding)
        if not started and all(lengths):
            started, first_tokens = time.perf_counter(), sum(lengths)
    elapsed = time.perf_counter() - started
    counts = {k: v - before[k] for k, v in spec_counts(engine).items()}
    check_counts(counts, decode_tokens, request_steps, len(prompts), num_drafts)
    cached = sum(result.num_cached_tokens or 0 for result in results)
    found: dict[str, float] = {
        "tokens_per_second": (sum(lengths) - first_tokens) / elapsed,
        "engine_steps": engine_steps,
        "request_steps": request_steps,
        "decode_tokens": decode_tokens,
        "tokens_per_step": decode_tokens / request_steps,
        "prompt_tokens_computed": sum(map(len, prompts)) - cached,
        **meter.times(len(prompts)),
    }
    if counts["drafts"]:
        found |= {**counts, "accepted_length": 1 + counts["accepted_tokens"] / counts["drafts"]}
    return {"metrics": found, "tokens": [result.token_ids for result in results]}


def check_counts(
    counts: Mapping[str, float], decode_tokens: int, request_steps: int, batch: int, drafts: int
) -> None:
    """Hold vLLM's counters against steps and tokens.

    A request gains one token per step and the accepted drafts; of the last step's, those behind
    the end of the output are counted as accepted and cut off.

    Parameters
    ----------
    counts : mapping
        What `COUNTS` grew by.
    decode_tokens, request_steps : int
        Tokens behind the first ones; steps in which a request gained some, over all requests.
    batch, drafts : int
        Requests; draft tokens per step.

    Raises
    ------
    BenchError
        If they disagree.
    """
    extra = counts["accepted_tokens"] - (decode_tokens - request_steps)
    if not 0 <= extra <= drafts * batch or counts["drafts"] > request_steps:
        raise BenchError(
            f"counters and steps disagree: {decode_tokens} tokens in {request_steps} steps of "
            f"requests, but vLLM counts {dict(counts)}"
        )

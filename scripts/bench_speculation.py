"""No speculation, ngram and draft mode, in turns, over the same prompts; times of draft and verify.

    python scripts/bench_speculation.py --out results                 # GPU, or small on CPU
    python scripts/bench_speculation.py --out results --model llama-3-8b --accepted 4.2
    python scripts/bench_speculation.py --out results --budget 0.12 --draft-tokens 6 --batch 1 4

Each variant is an engine in a process of its own: stock vLLM, stock vLLM with its ngram
speculation, the plugin in draft mode. Greedy, fixed output length. Prompts are prefilled
beforehand, so that all requests of a batch decode together. Writes a CSV, a JSON and a plot;
docs/benchmarks/README.md explains every column, docs/speculation.md the model of what it should be
worth. Models by name have dummy weights: their times are right and their acceptance means nothing
(`--accepted`).
"""

import argparse
import contextlib
import csv
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_kvcompress.config import parse_config
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation import serving_report as reports
from vllm_kvcompress.evaluation.serving_client import BenchError
from vllm_kvcompress.evaluation.serving_models import MODELS, write_model
from vllm_kvcompress.evaluation.speculation_model import ModelShape, Speculation
from vllm_kvcompress.settings import merge_fields

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / ".demo"
STOCK, NGRAM, DRAFT = VARIANTS = ("none", "ngram", "draft")
NUM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What an option is where it is not given.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpu": {
        "model": "llama-3-8b",
        "prompt_len": 32_768,
        "output_len": 128,
        "batch": [1, 8, 16],
        "block_size": 16,
        "dtype": "bfloat16",
    },
    "cpu": {
        "model": str(ROOT / "examples" / "probe-model"),
        "prompt_len": 1000,
        "output_len": 32,
        "batch": [1, 4],
        "block_size": 32,
        "dtype": "float32",
    },
}
COUNTS = ("drafts", "draft_tokens", "accepted_tokens")
UNITS = {
    "tokens_per_second": "output tokens/s",
    "engine_steps": "count",
    "request_steps": "count",
    "decode_tokens": "count",
    "drafts": "count",
    "draft_tokens": "count",
    "accepted_tokens": "count",
    "accepted_length": "tokens per draft",
    "tokens_per_step": "tokens per request and step",
    "step_seconds": "s",
    "pass_seconds": "s",
    "draft_seconds": "s",
    "draft_step_seconds": "s",
    "full_steps": "count",
    "view_share": "share of the prompt",
    "equal_tokens": "count",
    "prompt_tokens_computed": "count",
}
INTERPRETER = (
    "Times are of Triton's interpreter on a CPU, where a pass costs what its kernel launches cost: "
    "they say nothing about a GPU. Counts (steps, accepted tokens) are exact."
)

# --- in the process of an engine ----------------------------------------------------------


@dataclass
class Pass:
    """One pass of the target model and what followed it in the same step.

    Attributes
    ----------
    start, draft_start, draft_end : Any
        Marks of `Meter.mark`; without drafting the last two are None.
    end : Any
        After sampling and drafting.
    rows, num_drafts, draft_steps : int
        Requests; draft tokens verified; draft steps run.
    decodes : bool
        Whether every request was past its prompt.
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
    """

    def __init__(self, engine: Any, on_gpu: bool, prompt_len: int, has_views: bool) -> None:
        self.engine, self.on_gpu, self.prompt_len = engine, on_gpu, prompt_len
        self.has_views, self.proposes = has_views, False
        self.passes: list[Pass] = []
        runner = engine.runner
        runner.execute_model = self._started(runner.execute_model)
        runner.sample_tokens = self._ended(runner.sample_tokens)
        self.speculator = getattr(runner, "speculator", None)
        if self.speculator is not None:
            self.speculator.propose = self._proposed(self.speculator.propose)
            if has_views:
                # The target is its own drafter: its forwards inside `propose` are draft steps.
                self.speculator.model.register_forward_pre_hook(self._note_draft_step)

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
            current.draft_start, self.proposes = self.mark(), True
            found = original(batch, *args, **kwargs)
            current.draft_end, self.proposes = self.mark(), False
            if self.has_views:
                current.view_share = self._view_share(batch)
            return found

        return propose

    def _note_draft_step(self, *args: Any) -> None:
        if self.proposes:
            self.passes[-1].draft_steps += 1

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
    """Decode a batch whose prompts are in the prefix cache; counts, times and tokens."""
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
    """
    extra = counts["accepted_tokens"] - (decode_tokens - request_steps)
    if not 0 <= extra <= drafts * batch or counts["drafts"] > request_steps:
        raise BenchError(
            f"counters and steps disagree: {decode_tokens} tokens in {request_steps} steps of "
            f"requests, but vLLM counts {dict(counts)}"
        )


def serve(connection: Any, variant: str, options: dict[str, Any]) -> None:
    """An engine's process: answer each batch with its measurements, until told to stop."""
    log = os.open(options["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if not options["on_gpu"]:
        # With few cores, threads wait for each other longer than they compute.
        os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if variant != DRAFT:
        # Stock without the plugin's hooks; on CPU model runner V2 needs the interpreter.
        os.environ["VLLM_PLUGINS"] = "kvcompress_cpu_triton"
    try:
        from vllm_kvcompress.evaluation.engine import Engine

        engine = Engine(options["model"], options["setting"], **options["engine"])
        meter = Meter(engine, options["on_gpu"], options["prompt_len"], variant == DRAFT)
        connection.send(None)
        while (task := connection.recv()) is not None:
            prompts, output_len = task
            connection.send(measure(meter, prompts, output_len, options["num_drafts"]))
        engine.close()
    except Exception as problem:
        traceback.print_exc()
        connection.send(f"{type(problem).__name__}: {problem}")


class Child:
    """An engine in a process of its own."""

    def __init__(self, variant: str, options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.variant, self.log = variant, options["log"]
        self.process = context.Process(target=serve, args=(theirs, variant, options))
        self.process.start()
        theirs.close()
        self._answer()

    def _answer(self) -> Any:
        try:
            found = self.connection.recv()
        except EOFError:
            found = "the process ended"
        if isinstance(found, str):
            self.stop()
            raise BenchError(f"{self.variant}: {found} (log: {Path(self.log).name})")
        return found

    def measure(self, prompts: list[list[int]], output_len: int) -> dict[str, Any]:
        """One batch."""
        self.connection.send((prompts, output_len))
        return self._answer()

    def stop(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


# --- sizes and prompts --------------------------------------------------------------------


def engine_options(args: argparse.Namespace, variant: str, model: Path) -> dict[str, Any]:
    """What an engine's process is told; all variants get the same pool."""
    engine: dict[str, Any] = {
        "dtype": args.dtype,
        "max_model_len": args.prompt_len + args.output_len + args.draft_tokens + 1,
        "max_num_seqs": max(args.batch),
        "max_num_batched_tokens": 8192,
        "block_size": args.block_size,
        "kv_cache_memory_bytes": pool_bytes(args),
        "enforce_eager": not args.on_gpu,
        "enable_prefix_caching": True,
        "disable_log_stats": False,  # counters of speculative decoding
        "load_format": "dummy" if args.model in MODELS else "auto",
    }
    if args.on_gpu:
        engine["gpu_memory_utilization"] = 0.1  # does not size the pool
    if variant == NGRAM:
        engine["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": args.draft_tokens,
            "prompt_lookup_min": args.ngram[0],
            "prompt_lookup_max": args.ngram[1],
        }
    return {
        "model": str(model),
        "setting": setting(args) if variant == DRAFT else None,
        "engine": {**engine, **args.engine_args},
        "log": str(LOGS / f"bench_speculation_{variant}.log"),
        "on_gpu": args.on_gpu,
        "prompt_len": args.prompt_len,
        "num_drafts": args.draft_tokens,
    }


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """The plugin's setting in draft mode."""
    base: dict[str, Any] = {
        "preset": args.preset,
        "mode": "draft",
        "draft": {"tokens": args.draft_tokens},
        "min_prompt_len": min(512, args.prompt_len // 2),
        "trigger": "end_of_prompt",
        "budget": {"ratio": args.budget},
    }
    return merge_fields(base, args.setting)


def view_ratio(args: argparse.Namespace) -> float:
    """Share of the prompt that a view is meant to hold."""
    config = parse_config(setting(args))
    assert config is not None
    ratio = config.budget.ratio or config.budget.tokens / args.prompt_len  # type: ignore[operator]
    return min(max(ratio, config.budget.floor / args.prompt_len), 1.0)


def shape_of(args: argparse.Namespace) -> ModelShape:
    """Shape of the measured model in the dtype it runs in."""
    if args.model in MODELS:
        config = MODELS[args.model]
    else:
        path = Path(args.model) / "config.json"
        if not path.is_file():
            raise ConfigError(
                f"--model: must be {', '.join(MODELS)} or a model's folder, got {args.model!r}"
            )
        config = json.loads(path.read_text(encoding="utf-8"))
    size = NUM_BYTES[args.dtype]
    return ModelShape.from_config(config, weight_bytes=size, cache_bytes=size)


def pool_bytes(args: argparse.Namespace) -> int:
    """Bytes of the pool: the largest batch with its views, an output more to spare."""
    step = args.output_len + args.draft_tokens + args.block_size
    blocks = math.ceil((args.prompt_len * (1 + view_ratio(args)) + 2 * step) / args.block_size) + 4
    block = shape_of(args).kv_token_bytes * args.block_size
    return round(max(args.batch) * blocks * block + 8 * block)


def check_memory(args: argparse.Namespace, memory: int) -> None:
    """Refuse a batch whose caches and weights the GPU cannot hold."""
    sizes = (1, args.prompt_len, view_ratio(args), args.draft_tokens, args.output_len)
    case = Speculation(shape_of(args), *sizes)
    fits = case.largest_batch(memory, reserve=0.05 * memory + 5 * 2**30)
    if max(args.batch) > fits and args.model in MODELS:
        raise ConfigError(
            f"--batch: {max(args.batch)} requests of {args.prompt_len} tokens with views of "
            f"{view_ratio(args):.0%} do not fit beside the weights on a GPU of "
            f"{memory / 2**30:.0f} GiB; at most {fits} do."
        )


def make_prompts(args: argparse.Namespace, model: Path, batch: int) -> list[list[int]]:
    """The largest batch: needle prompts for real weights, random tokens for dummy ones."""
    if args.model in MODELS:
        rng = random.Random(args.seed)
        size = MODELS[args.model]["vocab_size"]
        return [[rng.randrange(2, size) for _ in range(args.prompt_len)] for _ in range(batch)]
    from transformers import AutoTokenizer

    from vllm_kvcompress.evaluation.tasks.needle import make_samples

    encode = AutoTokenizer.from_pretrained(model).encode
    samples = make_samples(batch, args.prompt_len, encode, seed=args.seed)
    return [encode(sample.prompt) for sample in samples]


# --- the run ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One measured number."""

    batch: int
    round: int
    variant: str
    metric: str
    value: float


Values = dict[tuple[int, str, str], list[float]]
"""(batch, variant, metric) to one value per round."""


def order(variants: Sequence[str], number: int) -> list[str]:
    """Variants of a round: rotated by one place, backwards in odd rounds."""
    shift = number % len(variants)
    turned = [*variants[shift:], *variants[:shift]]
    return turned[::-1] if number % 2 else turned


def run_all(args: argparse.Namespace, add: Callable[[list[Row]], None]) -> None:
    """All rounds of all variants and batches."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = Path(args.model)
        if args.model in MODELS:
            length = args.prompt_len + args.output_len + args.draft_tokens + 1
            model = write_model(Path(folder) / args.model, args.model, length)
        # Smaller batches are the beginning of the largest: the pool has room for its prompts alone.
        prompts = make_prompts(args, model, max(args.batch))
        children: dict[str, Child] = {}
        reference: dict[int, list[list[int]]] = {}

        @contextlib.contextmanager
        def engine(variant: str) -> Iterator[Child]:
            if not args.one_at_a_time:
                if variant not in children:
                    children[variant] = start(args, variant, model, prompts)
                    stack.callback(children[variant].stop)
                yield children[variant]
                return
            child = start(args, variant, model, prompts)
            try:
                yield child
            finally:
                child.stop()

        def equal(batch: int, found: list[list[int]]) -> int:
            pairs = zip(reference[batch], found, strict=True)
            return sum(a == b for one, two in pairs for a, b in zip(one, two, strict=True))

        waiting: list[tuple[int, int, str, list[list[int]]]] = []
        for number in range(1, args.rounds + 1):
            for variant in order(VARIANTS, number - 1):
                with engine(variant) as child:
                    for batch in args.batch:
                        found = child.measure(prompts[:batch], args.output_len)
                        metrics = found["metrics"]
                        if variant == STOCK:
                            reference.setdefault(batch, found["tokens"])
                        waiting.append((batch, number, variant, found["tokens"]))
                        add([Row(batch, number, variant, k, v) for k, v in metrics.items()])
                        print(
                            f"  round {number}, {variant}, batch {batch}: "
                            f"{metrics['tokens_per_second']:.1f} tok/s",
                            flush=True,
                        )
            done = [(b, n, v, equal(b, tokens)) for b, n, v, tokens in waiting]
            add([Row(b, n, v, "equal_tokens", count) for b, n, v, count in done])
            waiting.clear()


def start(args: argparse.Namespace, variant: str, model: Path, prompts: list[list[int]]) -> Child:
    """Start an engine and run every batch once, shortly: graphs, kernels, prefix cache."""
    print(f"starting {variant}", flush=True)
    child = Child(variant, engine_options(args, variant, model))
    for batch in args.batch:
        child.measure(prompts[:batch], min(args.output_len, 4 * (args.draft_tokens + 2)))
    return child


def provenance(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Where the numbers come from, without this machine's paths."""
    options = {key: value for key, value in vars(args).items() if key not in ("out", "on_gpu")}
    options["model"] = reports.public_words([args.model], ROOT)[0]
    words = reports.public_words(argv, ROOT)
    return {
        "command": " ".join(["python", "scripts/bench_speculation.py", *words]),
        "commit": reports.commit_of(ROOT),
        "versions": reports.versions(),
        "device": reports.device_name(args.on_gpu),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": options,
    }


# --- what it means ------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest, highest."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def conclude(args: argparse.Namespace, shape: ModelShape, values: Values) -> list[dict[str, Any]]:
    """Per batch and variant: medians, speed-up measured, and what step times and bytes give.

    `speed_up` is tokens per second over no speculation's, `step_ratio` this variant's step over the
    plain one, both within a round. `by_steps` is accepted length over `step_ratio`; `by_bytes` is
    the model's speed-up at the same length.
    """
    found = []
    given = {DRAFT: args.accepted, NGRAM: args.accepted_ngram}
    for batch in args.batch:
        plain_rates = values[batch, STOCK, "tokens_per_second"]
        plain_steps = values[batch, STOCK, "step_seconds"]
        for variant in VARIANTS:
            entry: dict[str, Any] = {"batch": batch, "variant": variant}
            entry["tokens"] = batch * args.output_len
            for (other, name, metric), each in values.items():
                if (other, name) == (batch, variant):
                    entry[metric] = spread(each)
            if variant == STOCK or "accepted_length" not in entry:
                found.append(entry)
                continue
            rates = values[batch, variant, "tokens_per_second"]
            entry["speed_up"] = spread([a / b for a, b in zip(rates, plain_rates, strict=True)])
            length = given[variant] or entry["accepted_length"]["median"]
            share = entry.get("view_share", {"median": view_ratio(args)})["median"]
            tail = args.output_len // 2
            sizes = (batch, args.prompt_len, share, args.draft_tokens, tail)
            case = Speculation(shape, *sizes)
            mode = "draft" if variant == DRAFT else "given"
            entry["at_length"] = length
            entry["length_given"] = bool(given[variant])
            steps = values[batch, variant, "step_seconds"]
            cost = spread([mine / plain for mine, plain in zip(steps, plain_steps, strict=True)])
            entry["step_ratio"] = cost
            entry["by_steps"] = length / cost["median"]
            entry["by_bytes"] = case.speed_up(length, mode)
            entry["length_for_2x"] = 2 * cost["median"]
            if variant == DRAFT:
                entry["by_bytes_limit"] = case.limit
                entry["tokens_to_pay"] = case.tokens_to_pay(length)
            found.append(entry)
    return found


def make_table(entries: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One line per batch and variant; medians over rounds."""
    columns = ["batch", "variant", "tok/s", "steps", "accepted\nlength", "tokens\nper step"]
    columns += ["ms\nper step", "ms verify\n(or plain)", "ms\ndrafting", "ms per\ndraft step"]
    columns += ["speed-up\nmeasured", "by steps", "by bytes", "equal\ntokens"]
    table = Table(title=title, title_justify="left")
    for column in columns:
        left = column == "variant"
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    formats = {
        "tokens_per_second": "{:.1f}",
        "engine_steps": "{:.0f}",
        "accepted_length": "{:.2f}",
        "tokens_per_step": "{:.2f}",
    }
    for entry in entries:
        cells = [str(entry["batch"]), entry["variant"]]
        cells += [f.format(entry[m]["median"]) if m in entry else "" for m, f in formats.items()]
        for metric in ("step_seconds", "pass_seconds", "draft_seconds", "draft_step_seconds"):
            cells.append(f"{entry[metric]['median'] * 1e3:.1f}" if metric in entry else "")
        rate = entry.get("speed_up")
        cells.append(
            f"{rate['median']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]" if rate else ""
        )
        mark = f" (at {entry['at_length']:g})" if entry.get("length_given") else ""
        cells += [f"{entry[m]:.2f}{mark}" if m in entry else "" for m in ("by_steps", "by_bytes")]
        cells.append(f"{entry['equal_tokens']['low']:.0f} of {entry['tokens']}")
        table.add_row(*cells)
    return table


def target_line(entry: Mapping[str, Any], num_drafts: int) -> str:
    """What the accepted length would have to be for twice the tokens per second."""
    needed, most = entry["length_for_2x"], num_drafts + 1
    out_of_reach = f", more than the {most} there can be" if needed > most else ""
    return (
        f"batch {entry['batch']}, {entry['variant']}: at these step times 2x needs an accepted "
        f"length of {needed:.2f}{out_of_reach}"
    )


def write_plot(path: Path, entries: Sequence[Mapping[str, Any]], title: str) -> None:
    """Tokens per second over no speculation, and what a step's time goes to."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    names = [f"{entry['variant']}\nbatch {entry['batch']}" for entry in entries]
    for index, entry in enumerate(entries):
        rate = entry.get("speed_up", {"median": 1.0, "low": 1.0, "high": 1.0})
        error = [[rate["median"] - rate["low"]], [rate["high"] - rate["median"]]]
        left.bar(index, rate["median"], yerr=error, color=f"C{VARIANTS.index(entry['variant'])}")
        if "by_bytes" in entry:
            left.plot(index, entry["by_bytes"], "k_", ms=18)
        bottom, step = 0.0, entry["step_seconds"]["median"] * 1e3
        target = entry["pass_seconds"]["median"] * 1e3
        drafting = entry.get("draft_seconds", {"median": 0.0})["median"] * 1e3
        parts = (target, drafting, max(step - target - drafting, 0.0))
        for part, color in zip(parts, ("C0", "C1", "0.8"), strict=True):
            right.bar(index, part, bottom=bottom, color=color)
            bottom += part
        length = entry.get("accepted_length", {"median": 1.0})["median"]
        right.text(index, bottom, f"{length:.2f}", ha="center", va="bottom")
    for axes in (left, right):
        axes.set_xticks(range(len(names)), names, fontsize=8)
    left.axhline(1.0, color="0.7", linewidth=0.8)
    left.set_ylabel("tokens/s over no speculation; _ by bytes")
    right.set_ylabel("ms per step; above: accepted length")
    for color, label in (("C0", "plain or verify pass"), ("C1", "drafting"), ("0.8", "rest")):
        right.bar(0, 0, color=color, label=label)
    right.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def run(args: argparse.Namespace, argv: list[str], console: Console) -> None:
    """Measure everything. The CSV grows with each batch: a run that fails keeps what it had."""
    reports.check_new_folder(args.out)
    shape = shape_of(args)
    config = parse_config(setting(args))
    assert config is not None
    if config.mode != "draft" or config.num_draft_tokens != args.draft_tokens:
        raise ConfigError("--setting: mode and draft.tokens are --draft-tokens' business.")
    if args.on_gpu:
        check_memory(args, reports.gpu_memory())
    about = provenance(args, argv)
    args.out.mkdir(parents=True)
    LOGS.mkdir(exist_ok=True)
    values: Values = {}
    started = time.monotonic()
    with (args.out / "speculation.csv").open("w", newline="", encoding="utf-8") as file:
        file.write("# " + json.dumps(about) + "\n")
        writer = csv.writer(file)
        writer.writerow(["batch", "round", "variant", "metric", "value", "unit"])

        def add(rows: list[Row]) -> None:
            for row in rows:
                values.setdefault((row.batch, row.variant, row.metric), []).append(row.value)
                value = f"{row.value:.6g}"
                where = [row.batch, row.round, row.variant]
                writer.writerow([*where, row.metric, value, UNITS[row.metric]])
            file.flush()

        try:
            run_all(args, add)
        finally:
            if not values:  # holds a header; would only be in the way of the next try
                shutil.rmtree(args.out)
    about["seconds"] = round(time.monotonic() - started)
    entries = conclude(args, shape, values)
    name = reports.public_words([args.model], ROOT)[0]
    title = (
        f"{name}, prompts of {args.prompt_len}, {args.output_len} tokens out, k = "
        f"{args.draft_tokens}, {args.preset} {view_ratio(args):.0%}, {about['device']}"
    )
    console.print(make_table(entries, title))
    for entry in entries:
        if "length_for_2x" in entry:
            print(target_line(entry, args.draft_tokens))
    note = "" if args.on_gpu else INTERPRETER
    if args.model in MODELS:
        note += " Dummy weights: acceptance, and every speed-up measured with it, means nothing."
    if note:
        print(note.strip())
    found = {**about, "note": note.strip(), "results": entries}
    (args.out / "speculation.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    kind = "" if args.on_gpu else "\nCPU: times are of Triton's interpreter"
    write_plot(args.out / "speculation.png", entries, title + kind)
    print(f"Results are in {args.out}.")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Read the command line; what is not given depends on whether there is a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="a folder that does not exist yet")
    add("--device", choices=["auto", "cpu", "gpu"], default="auto")
    add("--model", help=f"a folder, or with dummy weights {', '.join(MODELS)}")
    add("--dtype", choices=NUM_BYTES)
    add("--prompt-len", type=int, metavar="N")
    add("--output-len", type=int, metavar="N", help="at least 4 (k + 1)")
    add("--batch", type=int, nargs="+", metavar="N")
    add("--rounds", type=int, default=3)
    add("--draft-tokens", type=int, default=4, metavar="K", help="for ngram and draft; 1 to 16")
    add("--preset", default="snapkv", help="policy of the view")
    add("--budget", type=float, default=0.25, help="share of the prompt in the view")
    add("--setting", type=json.loads, default={}, metavar="JSON", help="laid over draft's setting")
    add("--ngram", type=int, nargs=2, default=[2, 4], metavar=("MIN", "MAX"))
    add("--accepted", type=float, metavar="N", help="accepted length to judge draft's times at")
    add("--accepted-ngram", type=float, metavar="N", help="the same for ngram's")
    add("--block-size", type=int)
    add("--engine-args", type=json.loads, default={}, metavar="JSON", help="for every engine")
    add(
        "--one-at-a-time",
        action=argparse.BooleanOptionalAction,
        help="start and stop engines each round (default on a GPU)",
    )
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.on_gpu = args.device == "gpu" or (args.device == "auto" and has_gpu())
    for name, value in DEFAULTS["gpu" if args.on_gpu else "cpu"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.one_at_a_time is None:
        args.one_at_a_time = args.on_gpu
    k = args.draft_tokens
    rules = [
        ("--draft-tokens", 1 <= k <= 16, "from 1 to 16"),
        ("--budget", 0 < args.budget <= 1, "above 0 and at most 1"),
        ("--output-len", args.output_len >= 4 * (k + 1), f"at least {4 * (k + 1)}"),
        ("--prompt-len", args.prompt_len >= 128, "at least 128"),
        ("--batch", min(args.batch) >= 1, "from 1 up"),
        ("--rounds", args.rounds >= 1, "from 1 up"),
        ("--ngram", 1 <= args.ngram[0] <= args.ngram[1], "1 <= MIN <= MAX"),
        ("--accepted", 1 <= (args.accepted or 1) <= k + 1, f"from 1 to {k + 1}"),
        ("--accepted-ngram", 1 <= (args.accepted_ngram or 1) <= k + 1, f"from 1 to {k + 1}"),
    ]
    for option, is_good, rule in rules:
        if not is_good:
            parser.error(f"argument {option}: must be {rule}")
    return args


def has_gpu() -> bool:
    """Whether torch sees an NVIDIA GPU."""
    import torch

    return torch.cuda.is_available()


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    # Tables go to files as well: wide enough for all columns where there is no terminal.
    console = Console(width=None if sys.stdout.isatty() else 170)
    try:
        run(args, argv, console)
    except (BenchError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

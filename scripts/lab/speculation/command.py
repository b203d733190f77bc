"""No speculation, ngram and draft mode, in turns, over the same prompts; times of draft and verify.

    python scripts/bench_speculation.py --out results                 # GPU, or small on CPU
    python scripts/bench_speculation.py --out results --model llama-3-8b --accepted 4.2
    python scripts/bench_speculation.py --out results --budget 0.12 --draft-tokens 6 --batch 1 4

Each variant is an engine in a process of its own: stock vLLM, stock vLLM with its ngram
speculation, the plugin in draft mode. Greedy, fixed output length. Prompts are prefilled
beforehand, so that all requests of a batch decode together. Writes a CSV, a JSON and a plot;
docs/benchmarks/README.md explains every column, docs/benchmarks/speculation.md the model of what
it should be worth. Models by name have dummy weights: their times are right and their acceptance
means nothing (`--accepted`).
"""

import argparse
import contextlib
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lab.places import LOGS, ROOT
from lab.serving import report as reports
from lab.serving.client import BenchError
from lab.serving.models import MODELS, write_model
from lab.speculation.engines import DRAFT, NGRAM, STOCK, VARIANTS
from lab.speculation.processes import Child
from lab.speculation.report import (
    INTERPRETER,
    CsvLog,
    Row,
    Sizes,
    conclude,
    make_table,
    target_line,
    write_plot,
)
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.config.settings import merge_fields
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.provenance import gpu_memory, provenance, public_words
from vllm_kvcompress.speed.drafting import Speculation
from vllm_kvcompress.speed.shapes import ModelShape

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


def sizes_of(args: argparse.Namespace) -> Sizes:
    """What conclusions depend on."""
    return Sizes(
        batches=args.batch,
        prompt_len=args.prompt_len,
        output_len=args.output_len,
        num_drafts=args.draft_tokens,
        view_ratio=view_ratio(args),
        lengths={DRAFT: args.accepted, NGRAM: args.accepted_ngram},
    )


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


def about_run(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Where the numbers come from, without this machine's paths."""
    options = {key: value for key, value in vars(args).items() if key not in ("out", "on_gpu")}
    options["model"] = public_words([args.model], ROOT)[0]
    command = " ".join(["python", "scripts/bench_speculation.py", *public_words(argv, ROOT)])
    return {**provenance(command, ROOT, args.on_gpu), "options": options}


def run(args: argparse.Namespace, argv: list[str], console: Console) -> None:
    """Measure everything. The CSV grows with each batch: a run that fails keeps what it had."""
    reports.check_new_folder(args.out)
    shape = shape_of(args)
    config = parse_config(setting(args))
    assert config is not None
    if config.mode != "draft" or config.num_draft_tokens != args.draft_tokens:
        raise ConfigError("--setting: mode and draft.tokens are --draft-tokens' business.")
    if args.on_gpu:
        check_memory(args, gpu_memory())
    about = about_run(args, argv)
    args.out.mkdir(parents=True)
    LOGS.mkdir(exist_ok=True)
    started = time.monotonic()
    with contextlib.closing(CsvLog(args.out / "speculation.csv", about)) as log:
        try:
            run_all(args, log.add)
        finally:
            if not log.values:  # holds a header; would only be in the way of the next try
                shutil.rmtree(args.out)
    about["seconds"] = round(time.monotonic() - started)
    entries = conclude(sizes_of(args), shape, log.values)
    name = public_words([args.model], ROOT)[0]
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

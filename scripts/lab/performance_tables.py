"""Write the computed tables of docs/performance.md anew, from the functions of `plan --speed`.

    python scripts/lab/performance_tables.py            # rewrites the tables in place
    python scripts/lab/performance_tables.py --check    # status 1 if the code gives others

A table stands between ``<!-- computed: NAME -->`` and ``<!-- end -->``. Nothing here is measured.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a file: Python puts this folder on its path, `lab` is one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lab.places import ROOT
from lab.serving.models import MODELS
from vllm_kvcompress.cli.speed import draft_limit
from vllm_kvcompress.config.reading import parse_config, preset_names
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.lengths.geometry import ModelGeometry
from vllm_kvcompress.lengths.sizing import capacity, request_usage
from vllm_kvcompress.speed.machine import make_machine
from vllm_kvcompress.speed.paths import Path as Work
from vllm_kvcompress.speed.plan import SpeedPlan
from vllm_kvcompress.speed.shapes import ModelShape

PAGE = ROOT / "docs" / "performance.md"
MACHINE = make_machine("h200")
MEMORY = 141e9  # of an H200, by the same data sheet
USED = 0.9  # of it, as vLLM's --gpu-memory-utilization
LENGTHS, BATCHES = (8192, 32768, 131072), (1, 32, 256)
OUTPUT, LONG_OUTPUT = 256, 4096
PRESET, ACCEPTED, BLOCK = "auto", 3.0, 16

# Numbers of the public config.json files.
LLAMA_70B = {
    **MODELS["llama-3-8b"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-3-8B": (MODELS["llama-3-8b"], 1),
    "Qwen3-8B": (MODELS["qwen3-8b"], 1),
    "Llama-3-70B, each of 8 tensor-parallel ranks": (LLAMA_70B, 8),
}
FIRST = next(iter(SHAPES))


# --- plans --------------------------------------------------------------------------------


@cache
def setting(preset: str) -> CompressionConfig:
    """A preset; where tasks matter, that of the task localization."""
    config = parse_config(preset)
    assert config is not None
    return config.by_task["localization"] if config.tasks else config


@cache
def plan_of(
    model: str, prompt_len: int, output_len: int = OUTPUT, preset: str = PRESET
) -> SpeedPlan:
    """One setting on one model's shape."""
    config, ranks = SHAPES[model]
    whole = ModelShape.from_config(config)
    geometry = ModelGeometry(whole.num_layers, whole.num_kv_heads, whole.head_dim, "bfloat16")
    chosen = setting(preset)
    usage = request_usage(geometry, chosen, prompt_len, output_len, BLOCK, ranks)
    return SpeedPlan(whole.shard(ranks), MACHINE, chosen, usage, prompt_len, output_len, BLOCK)


def pool(plan: SpeedPlan) -> int:
    """Bytes left for the cache beside a worker's weights."""
    return int(USED * MEMORY - plan.shape.resident_bytes)


# --- text ---------------------------------------------------------------------------------


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def per_model(make: Callable[[str], str]) -> str:
    """A table for every model."""
    return "\n\n".join(f"**{model}**\n\n{make(model)}" for model in SHAPES)


def size(num_bytes: float) -> str:
    """GB, three digits."""
    return number(num_bytes / 1e9)


def number(value: float) -> str:
    """Three digits, or all those before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def both(work: Work, count: int = 1) -> str:
    """GB and launches of so many."""
    return f"{size(work.num_bytes * count)} / {work.launches * count:,}"


def milliseconds(seconds: float) -> str:
    """Of a time."""
    return number(seconds * 1e3)


# --- tables -------------------------------------------------------------------------------


def paths(model: str) -> str:
    """GB and launches of every path, for so many requests."""
    rows = []
    for length in LENGTHS:
        plan = plan_of(model, length)
        added = {stage.name: Work((stage,)) for stage in plan.compaction.path.stages}
        score = Work.of([added["queries"], added["score"], added["policy"]])
        copy = Work.of([added["select"], added["copy"]])
        for batch in BATCHES:
            case = plan.drafting(batch)
            cells = [f"{length:,}", str(batch), both(plan.prefill, batch)]
            cells += [both(score, batch), both(copy, batch)]
            cells += [both(plan.stock_step(batch)), both(plan.step(batch))]
            rows.append([*cells, both(case.draft_step), both(case.verify_pass)])
    titles = ["prompt", "batch", "prefill", "score", "compact", "decode step, whole cache"]
    return table([*titles, "decode step, compressed", "draft step", "verify pass"], rows)


def once(model: str) -> str:
    """Times of what happens once per request."""
    rows = []
    for length in LENGTHS:
        plan = plan_of(model, length)
        whole, prompt = plan.compaction.path, plan.prefill.seconds(MACHINE)
        parts = [milliseconds(stage.device_seconds(MACHINE)) for stage in whole.stages]
        total = whole.seconds(MACHINE)
        ends = [milliseconds(whole.host_seconds(MACHINE)), milliseconds(total)]
        cells = [f"{length:,}", number(plan.prefill.flops / 1e12), milliseconds(prompt)]
        rows.append([*cells, *parts, *ends, f"{total / prompt:.2%}"])
    names = [f"{stage.name}, ms" for stage in plan_of(model, LENGTHS[0]).compaction.path.stages]
    titles = ["prompt", "prefill, TFLOP", "prefill, ms", *names, "launches, ms", "compression, ms"]
    return table([*titles, "of the prefill"], rows)


def steps(model: str) -> str:
    """Times of steps at a fixed batch, whether or not it fits."""
    rows = []
    for length in LENGTHS:
        plan = plan_of(model, length)
        fit = capacity(plan.usage, pool(plan))
        for batch in BATCHES:
            times = [plan.stock_step(batch).seconds(MACHINE), plan.step(batch).seconds(MACHINE)]
            most = {"whole": fit.stock_decoding, "compressed": fit.one_by_one}
            fits = [name for name, count in most.items() if count >= batch]
            pays = plan.tokens_to_pay(batch)
            gained = plan.drafting(batch).speed_up(ACCEPTED, machine=MACHINE)
            rows.append(
                [f"{length:,}", str(batch), " and ".join(fits) or "neither"]
                + [*map(milliseconds, times), f"{plan.gain(batch):.2f}"]
                + ["never" if pays is None else number(pays)]
                + [draft_limit(plan, batch).removesuffix(" a step"), f"{gained:.2f}"]
            )
    titles = ["prompt", "batch", "fits", "whole, ms", "compressed, ms", "faster"]
    titles += ["pays after, output tokens", "draft mode pays from", f"draft mode at {ACCEPTED:g}"]
    return table(titles, rows)


def throughput(model: str) -> str:
    """Tokens per second with a full pool."""
    rows = []
    for length in LENGTHS:
        for output in (OUTPUT, LONG_OUTPUT):
            plan = plan_of(model, length, output)
            found = plan.served(pool(plan), ACCEPTED)
            stock = found["without"]
            cells = [f"{length:,}", f"{output:,}"]
            for name in ("without", "with", "draft"):
                each = found[name]
                if each is None or stock is None:
                    cells += ["0", "", ""]
                    continue
                ratio = f" ({each.rate / stock.rate:.2f})" if name != "without" else ""
                cells += [str(each.batch), number(each.decode_rate), number(each.rate) + ratio]
            rows.append(cells)
    titles = ["prompt", "output"]
    for name in ("whole", "compressed", f"draft mode at {ACCEPTED:g}"):
        titles += [f"{name}: requests", "tokens/s decoding", "tokens/s with prompts"]
    return table(titles, rows)


def policies() -> str:
    """What one compaction of 32k tokens takes under every preset."""
    rows = []
    for preset in preset_names():
        plan = plan_of(FIRST, 32768, OUTPUT, preset)
        whole, config = plan.compaction.path, plan.config
        pays = plan.tokens_to_pay(32)
        cells = [f"`{preset}`", str(len(plan.usage.groups)), f"{whole.launches:,}"]
        cells += [size(whole.num_bytes), number(whole.flops / 1e12)]
        cells += [milliseconds(whole.device_seconds(MACHINE))]
        cells += [milliseconds(whole.host_seconds(MACHINE))]
        cells += [f"{whole.seconds(MACHINE) / plan.prefill.seconds(MACHINE):.2%}"]
        cells.append("never" if pays is None else number(pays))
        if config.compresses_while_decoding:
            cells[0] += f" (every {config.interval} output tokens)"
        rows.append(cells)
    titles = ["preset", "layer groups", "launches", "GB", "TFLOP", "GPU, ms", "host, ms"]
    return table([*titles, "of the prefill", "pays after, batch 32"], rows)


# --- where it pays ------------------------------------------------------------------------


def _rates(length: int, output: int) -> tuple[float, float, float]:
    """Tokens per second with prompts: whole, compressed, draft mode."""
    plan = plan_of(FIRST, length, output)
    found = plan.served(pool(plan), ACCEPTED).values()
    whole, compressed, draft = (each.rate if each else 0.0 for each in found)
    return whole, compressed, draft


def _added(plan: SpeedPlan) -> float:
    """Seconds of a compaction."""
    return plan.compaction.path.seconds(MACHINE)


def _pays(plan: SpeedPlan, batch: int) -> float:
    """Output tokens after which it has paid."""
    tokens = plan.tokens_to_pay(batch)
    assert tokens is not None
    return tokens


def _bullets(points: dict[str, str]) -> str:
    return "\n".join(f"* **{title}**: {text}" for title, text in points.items())


def wins() -> str:
    """Sentences of the first model, every number computed."""
    plans = [plan_of(FIRST, length) for length in LENGTHS]
    long, full = plan_of(FIRST, 32768), plan_of(FIRST, 32768, LONG_OUTPUT)
    fit = capacity(full.usage, pool(full))
    whole, compressed, draft = _rates(32768, LONG_OUTPUT)
    pays = [_pays(plan, 32) for plan in plans]
    many = ", ".join(f"{plan.gain(32):.1f}" for plan in plans)
    alone = ", ".join(f"{plan.gain(1):.2f}" for plan in plans)
    drafting = long.drafting(32).speed_up(ACCEPTED, machine=MACHINE)
    return _bullets(
        {
            "A tight pool with long prompts and long outputs": (
                f"of 32k prompts with {LONG_OUTPUT:,} output tokens {fit.one_by_one} requests "
                f"decode at once instead of {fit.stock_decoding}, and {number(compressed)} "
                f"tokens/s come out instead of {number(whole)}, prompts included: "
                f"{compressed / whole:.1f} times as many."
            ),
            "Large batches at long contexts, whatever the pool": (
                f"a step of 32 requests of 8k, 32k, 128k is {many} times as fast; one request "
                f"alone gains {alone}."
            ),
            "It pays soon": (
                f"after {min(pays):.1f} to {max(pays):.1f} output tokens at these lengths; "
                f"compression adds {_added(long) / long.prefill.seconds(MACHINE):.2%} to a 32k "
                "prefill."
            ),
            "Draft mode, where the cache is what is read": (
                f"32 requests of 32k at {ACCEPTED:g} tokens a step are {drafting:.2f} times as "
                f"fast as plain decoding, and it pays from {long.needed_length(32):.2f} a step on. "
                f"With a full pool and {LONG_OUTPUT:,} output tokens it gives "
                f"{draft / whole:.2f} times the tokens/s."
            ),
        }
    )


def losses() -> str:
    """The same where it does not pay."""
    tiny, short = plan_of(FIRST, 1024), plan_of(FIRST, 8192)
    long, middle = plan_of(FIRST, 131072), plan_of(FIRST, 32768)
    small = tiny.compaction.path
    gains = {}
    for length in (8192, 131072):
        for output in (OUTPUT, LONG_OUTPUT):
            whole, compressed, _ = _rates(length, output)
            gains[length, output] = f"{compressed / whole:.2f}"
    slow = short.drafting(1).speed_up(ACCEPTED, machine=MACHINE)
    large = plan_of(list(SHAPES)[-1], 8192).drafting(256)
    views = middle.served(pool(middle), ACCEPTED)
    assert views["draft"] is not None and views["without"] is not None
    critical = plan_of(FIRST, 32768, OUTPUT, "criticalkv")
    loops, prompt = critical.compaction.path, critical.prefill.seconds(MACHINE)
    return _bullets(
        {
            "Short prompts, one request, ample pool": (
                "weights are what a step reads. At 1,024 tokens and batch 1 a step is "
                f"{tiny.gain(1):.3f} times as fast, at 8k {short.gain(1):.2f}. Compacting 1,024 "
                f"tokens is {small.launches} launches, {milliseconds(small.host_seconds(MACHINE))} "
                f"ms of the host for {milliseconds(small.device_seconds(MACHINE))} ms of the GPU, "
                f"and pays after {_pays(tiny, 1):.0f} output tokens. Prompts below 512 are left "
                "alone."
            ),
            "Prompts that take all the time": (
                f"a 128k prompt is {long.prefill.seconds(MACHINE):.1f} s of prefill, which "
                f"compression does not shorten. With {OUTPUT} output tokens a full pool gives "
                f"{gains[131072, OUTPUT]} times the tokens/s, with {LONG_OUTPUT:,} "
                f"{gains[131072, LONG_OUTPUT]}; at 8k {gains[8192, OUTPUT]} and "
                f"{gains[8192, LONG_OUTPUT]}."
            ),
            "Draft mode where weights are what is read": (
                f"at 8k and batch 1 it needs {short.needed_length(1):.2f} of at most "
                f"{short.config.draft.tokens + 1} tokens a step to break even, and at "
                f"{ACCEPTED:g} it is {slow:.2f} times as fast as plain decoding."
            ),
            "Draft mode where matrices are no longer read but computed": (
                "from about 200 tokens per step on. Llama-3-70B on 8 ranks with 256 requests of "
                f"8k verifies {256 * (large.num_drafts + 1):,} tokens at once: "
                f"{large.speed_up(ACCEPTED, machine=MACHINE):.2f} times plain decoding at "
                f"{ACCEPTED:g}."
            ),
            "Draft mode in a tight pool": (
                "it frees nothing and holds a view beside each cache; of 32k prompts "
                f"{views['draft'].batch} decode at once instead of {views['without'].batch}."
            ),
            "Policies that are not one kernel": (
                f"`criticalkv` makes {loops.launches:,} launches and moves {size(loops.num_bytes)} "
                f"GB for 32k tokens, {_added(critical) / prompt:.0%} of the prefill, and pays "
                f"after {_pays(critical, 32):.0f} output tokens. The table of presets has the "
                "others."
            ),
            "Many layer groups": (
                "every block table costs host time in every step, which is left out here."
            ),
        }
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "paths": lambda: per_model(paths),
    "once": lambda: per_model(once),
    "steps": lambda: per_model(steps),
    "throughput": lambda: per_model(throughput),
    "policies": policies,
    "wins": wins,
    "losses": losses,
}


def render(text: str) -> str:
    """The page with all tables computed anew."""

    def anew(match: re.Match[str]) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]]()}\n{match[4]}"

    return re.sub(r"(<!-- computed: (\w+) -->)\n(.*?)\n?(<!-- end -->)", anew, text, flags=re.S)


def main() -> int:
    """Rewrite the page, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    found = render(text)
    if not args.check:
        PAGE.write_text(found, encoding="utf-8")
    return int(args.check and found != text)


if __name__ == "__main__":
    sys.exit(main())

"""Print the figures that the README quotes, from real runs of the engine in this process.

    python scripts/show.py needle    exact answers per policy, budget and length
    python scripts/show.py lossless  tokens with nothing evicted against stock vLLM's
    python scripts/show.py pool      steps and preemptions in a pool that is too small, by trigger
    python scripts/show.py churn     what 200 mixed requests leave behind
    python scripts/show.py prefix    prefix-cache hits after the first owner was compressed
    python scripts/show.py long      prompts of 8,000 tokens in a pool of 3,000
    python scripts/show.py draft     greedy tokens of draft mode against stock vLLM's, 50 prompts

Each runs on CPU in float32 with the probe model, `draft` with two random ones besides. Every
command exits with 1 if what it is there to show does not hold.
"""

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab.long_prompts import show_long
from lab.places import PROBE_MODEL, ROOT
from lab.random_models import distinct_tokens, write_random_model
from lab.scenarios import SERVER, NeedleRow, churn, drain, needle_answers
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.provenance import versions
from vllm_kvcompress.evaluation.tasks.needle import make_samples
from vllm_kvcompress.metrics import CompressionStats

MODEL = str(PROBE_MODEL)
POLICIES = ("windowkv", "snapkv", "keydiff", "streaming_llm", "random")
FOUR_GROUPS = {
    "preset": "windowkv",
    "policy": {"window_size": 32, "layers_per_leader": None},
    "layer_groups": {"count": 4},
    "layer_budget": {"shape": "uniform"},
    "task": "localization",
}
PRESSURE = {**FOUR_GROUPS, "trigger": "pressure"}
BARE = "keydiff_bare"  # KeyDiff as kvpress has it: nothing is protected
BARE_SETTING = {"preset": "keydiff", "num_sink_tokens": 0, "observation_window": 1}


def heading(text: str) -> None:
    """Print a heading."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


# --- needle -------------------------------------------------------------------------------


def kvpress_counts(path: Path) -> dict[tuple[int, str, float], int]:
    """Right answers of the same prompts under kvpress, from the committed reference run."""
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    found = {(r["length"], r["policy"], r["ratio"]): r["num_right"] for r in data["results"]}
    same = {(n, BARE, r): right for (n, policy, r), right in found.items() if policy == "keydiff"}
    return {**found, **same}


def print_needle(rows: list[NeedleRow], reference: dict[tuple[int, str, float], int]) -> None:
    """One line per setting."""
    columns = f"{'prompt':>6} {'policy':14} {'kept':>5} {'pinned':6} {'right':>8} {'kvpress':>8}"
    print(f"{columns}  right at depths")
    for row in rows:
        other = None if row.pinned else reference.get((row.num_tokens, row.policy, row.ratio))
        print(
            f"{row.num_tokens:6} {row.policy:14} {row.ratio:5.0%} {'yes' if row.pinned else '':6} "
            f"{row.right:3} / {row.total:2} {'' if other is None else other:>8}  {span(row)}"
        )


def span(row: NeedleRow) -> str:
    """Least and greatest depth of a right answer."""
    if not row.right_depths:
        return ""
    return f"{min(row.right_depths):.2f} to {max(row.right_depths):.2f}"


def show_needle(args: argparse.Namespace) -> bool:
    """Exact answers, and the same prompts through kvpress where it has the method."""
    if args.setting:
        print_needle(needle_rows(json.loads(args.setting), [SERVER], args), {})
        return True
    rows = needle_rows(FOUR_GROUPS, POLICIES, args, pinned_ratio=0.12)
    bare = needle_rows(BARE_SETTING, [SERVER], args)
    rows += [replace(row, policy=BARE) for row in bare if row.policy == SERVER]
    reference = kvpress_counts(ROOT / "tests" / "data" / "kvpress_needle.json")
    heading("Exact answers")
    print_needle(rows, reference)
    if args.out:
        write_csv(args.out, rows, reference)
    return needle_holds(rows, reference)


def needle_rows(
    setting: Any, policies: Sequence[str], args: argparse.Namespace, **kwargs: Any
) -> list[NeedleRow]:
    """All lengths on one engine."""
    engine = Engine(MODEL, setting, kv_cache_memory_bytes=1 << 30)
    rows: list[NeedleRow] = []
    for length in args.lengths:
        rows += needle_answers(
            engine,
            length,
            args.num_samples,
            policies,
            (0.5, 0.12),
            progress=lambda line: print(line, end="\r", file=sys.stderr, flush=True),
            **kwargs,
        )
    engine.close()
    return rows


def needle_holds(rows: list[NeedleRow], reference: dict[tuple[int, str, float], int]) -> bool:
    """Numbers agree with kvpress within 2 at its settings, and pinning saves every policy."""
    full = {row.num_tokens: row.right for row in rows if row.policy == "none"}
    good = True
    for row in rows:
        other = None if row.pinned else reference.get((row.num_tokens, row.policy, row.ratio))
        same_settings = row.policy != "keydiff"  # the preset protects sinks and window, BARE not
        if same_settings and other is not None and abs(other - row.right) > 2:
            print(f"differs from kvpress by more than 2: {row.policy} {row.num_tokens} {row.ratio}")
            good = False
        if row.pinned and row.right < 0.9 * full[row.num_tokens]:
            print(f"pinned, but below 90 % of none: {row.policy} {row.num_tokens}")
            good = False
    return good


def write_csv(path: str, rows: list[NeedleRow], reference: dict[Any, int]) -> None:
    """Commit-ready results with their versions."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["# " + json.dumps(versions())])
        writer.writerow(["prompt_tokens", "policy", "ratio", "pinned", "right", "total", "kvpress"])
        for row in rows:
            other = None if row.pinned else reference.get((row.num_tokens, row.policy, row.ratio))
            kept = [row.num_tokens, row.policy, row.ratio, int(row.pinned), row.right, row.total]
            writer.writerow([*kept, "" if other is None else other])


# --- lossless -----------------------------------------------------------------------------


def show_lossless(args: argparse.Namespace) -> bool:
    """Every output token against stock vLLM's: none, ratio 1.0, budget or pool large enough."""
    max_tokens = 32
    stock = Engine(MODEL, None)
    prompts = [stock.tokenize(s.prompt) for s in make_samples(20, 2000, stock.tokenize, seed=1)]
    expected = stock.generate(prompts, max_tokens, ignore_eos=True)
    stock.close()
    engine = Engine(MODEL, FOUR_GROUPS)
    settings: dict[str, Any] = {
        "vllm_xargs kv_compression=none": {"kv_compression": "none"},
        "vllm_xargs kv_budget_ratio=1.0": {"kv_budget_ratio": 1.0},
        "vllm_xargs kv_budget_tokens=4000": {"kv_budget_tokens": 4000},
    }
    found = {
        name: engine.generate(prompts, max_tokens, xargs, ignore_eos=True)
        for name, xargs in settings.items()
    }
    compressed = sum(engine.scheduler.stats.requests.values())
    engine.close()
    engine = Engine(MODEL, PRESSURE)
    found["trigger pressure, ample memory"] = engine.generate(prompts, max_tokens, ignore_eos=True)
    whole = engine.scheduler.stats.uncompressed.get("ample_memory", 0)
    compressed += sum(engine.scheduler.stats.requests.values())
    engine.close()
    heading(f"20 prompts of ~2,000 tokens, {max_tokens} greedy tokens each, against stock vLLM")
    total, good = len(prompts) * max_tokens, whole == len(prompts)
    for name, tokens in found.items():
        pairs = zip(expected, tokens, strict=True)
        equal = sum(a == b for x, y in pairs for a, b in zip(x, y, strict=True))
        print(f"{name:36} {equal} of {total} tokens equal")
        good &= equal == total
    print(f"requests compressed: {compressed}; whole for ample memory: {whole}")
    return good


# --- pool, churn, prefix ------------------------------------------------------------------


def show_pool(args: argparse.Namespace) -> bool:
    """Steps to drain 32 prompts of 4k tokens in room for 7.5, without compression and with it."""
    settings: dict[str, Any] = {
        "stock vLLM": None,
        "windowkv 12 %, end of prompt": FOUR_GROUPS,
        "windowkv 12 %, pressure": PRESSURE,
        "windowkv 12 %, in the prompt": {**FOUR_GROUPS, "trigger": "prompt"},
    }
    reports, counts = {}, {}
    for name, setting in settings.items():
        groups = 1 if setting is None else 4  # four groups: four times the blocks, of a quarter
        engine = Engine(MODEL, setting, num_blocks=1 + 960 * groups, max_num_seqs=32)
        samples = make_samples(32, 4000, engine.tokenize, seed=2)
        prompts = [engine.tokenize(s.prompt) for s in samples]
        reports[name] = drain(engine, prompts, args.max_tokens)
        counts[name] = CompressionStats() if setting is None else engine.scheduler.stats
        engine.close()
    heading(f"32 prompts of ~4,000 tokens, {args.max_tokens} output tokens, 30,720 slots per layer")
    stock, *others = reports.values()
    for name, report in reports.items():
        stats = counts[name]
        print(
            f"{name:28} {report.steps:5} engine steps ({report.steps / stock.steps:4.0%}) "
            f"{report.preemptions:3} preemptions {stats.deferrals:3} deferrals "
            f"{sum(stats.requests.values()):3} requests compressed {dict(stats.compactions)}"
        )
    waited = sum(each.deferrals for each in counts.values())
    return waited == 0 and all(each.steps < stock.steps for each in others)


def show_churn(args: argparse.Namespace) -> bool:
    """What is left after 200 requests of all fates, in a pool too small for them."""
    engine = Engine(MODEL, FOUR_GROUPS, num_blocks=1 + 4 * 100, max_model_len=2560)
    report = churn(engine, 200)
    rows_left = int((engine.runner.model_state.lengths.evicted.np != 0).any(axis=0).sum())
    compressed = sum(engine.scheduler.stats.compactions.values())
    engine.close()
    heading("200 mixed requests")
    for name, value in vars(report).items():
        print(f"{name:22} {value}")
    print(f"{'compactions':22} {compressed}")
    print(f"{'worker rows not zero':22} {rows_left}")
    return report.blocks_missing == report.evicted_left == rows_left == 0


def show_prefix(args: argparse.Namespace) -> bool:
    """A repeated prompt hits the cache although its first owner was compressed."""
    engine = Engine(MODEL, FOUR_GROUPS)
    prompt = engine.tokenize(make_samples(1, 4000, engine.tokenize, seed=3)[0].prompt)
    engine.add("first", prompt)
    engine.drain()
    engine.add("again", prompt)
    engine.drain()
    engine.add("stock", prompt, xargs={"kv_compression": "none"})
    engine.drain()
    heading(f"One prompt of {len(prompt)} tokens, three times")
    for name, result in engine.results.items():
        print(f"{name:6} cached tokens {result.num_cached_tokens:5} {result.token_ids}")
    compressed = sum(engine.scheduler.stats.requests.values())
    print(f"compressed: {compressed} of 3 requests (the third asked for none)")
    first, again, _ = engine.results.values()
    engine.close()
    hit = again.num_cached_tokens or 0
    return compressed == 2 and hit > 0.9 * len(prompt) and first.token_ids == again.token_ids


# --- draft --------------------------------------------------------------------------------


def draft_prompts(engine: Engine, name: str, count: int) -> list[list[int]]:
    """Prompts of 200 to 700 tokens: needles for the probe model, else tokens in any order."""
    lengths = [200 + 10 * number for number in range(count)]
    if name != "probe":
        return [distinct_tokens(length, seed=length) for length in lengths]
    samples = [make_samples(1, length, engine.tokenize, seed=length)[0] for length in lengths]
    return [engine.tokenize(sample.prompt) for sample in samples]


def show_draft(args: argparse.Namespace) -> bool:
    """Nothing but the number of steps may differ."""
    good, draft = True, {"mode": "draft", "draft": {"tokens": 4}, "min_prompt_len": 128}
    setting = {"preset": "snapkv", "observation_window": 16, "budget": {"ratio": 0.25}, **draft}
    with tempfile.TemporaryDirectory() as folder:
        models = {"probe": MODEL}
        for name in ("llama", "qwen3"):
            models[name] = str(write_random_model(Path(folder) / name, name))
        heading(f"{args.num_samples} prompts, {args.max_tokens} greedy tokens each")
        for name, model in models.items():
            found = []
            extra: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 2048}
            extra = {} if name == "probe" else extra
            for each in (None, setting):
                engine = Engine(model, each, **extra)
                prompts = draft_prompts(engine, name, args.num_samples)
                tokens = engine.generate(prompts, args.max_tokens, ignore_eos=True)
                found.append((tokens, engine.num_steps))
                engine.close()
            (stock, stock_steps), (drafted, steps) = found
            pairs = zip(stock, drafted, strict=True)
            equal = sum(a == b for x, y in pairs for a, b in zip(x, y, strict=True))
            total = args.num_samples * args.max_tokens
            good &= equal == total
            print(f"{name:6} {equal} of {total} tokens equal, {stock_steps} steps -> {steps}")
    return good


def main() -> int:
    """Parse the command line and run one of the shows."""
    shows = {
        "needle": show_needle,
        "lossless": show_lossless,
        "pool": show_pool,
        "churn": show_churn,
        "prefix": show_prefix,
        "long": lambda args: show_long(MODEL, args.num_samples),
        "draft": show_draft,
    }
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("show", choices=shows)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 4000])
    parser.add_argument("--num-samples", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=256, help="output tokens (pool, draft)")
    parser.add_argument("--out", help="CSV file (needle)")
    parser.add_argument("--setting", help="try this setting alone, as JSON (needle)")
    args = parser.parse_args()
    return 0 if shows[args.show](args) else 1

"""Exact answers on the needle task for every preset, budget and prompt length, with intervals.

    python scripts/policy_table.py run --out docs/benchmarks/policies_needle_cpu.csv
    python scripts/policy_table.py show --out docs/benchmarks/policies_needle_cpu.csv

`run` appends: cells that are in the file already are not measured again. `show` prints the table of
docs/policies.md. The probe model on CPU in float32, one layer group per layer; prompts are
prefilled and decoded by Hugging Face transformers, compressed in between by the worker's own code
(`vllm_kvcompress.evaluation.replay`, held against the engine by tests/e2e/test_replay.py). One
thread: with few cores, threads wait for each other longer than they compute.
"""

import argparse
import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from show import MODEL, describe
from transformers import AutoTokenizer

from vllm_kvcompress.budgets import compaction_lengths
from vllm_kvcompress.config import parse_config, preset_names
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.evaluation.tasks.needle import is_right, make_samples
from vllm_kvcompress.request_options import parse_request, resolve_request
from vllm_kvcompress.settings import CompressionConfig

RATIOS = (0.5, 0.25, 0.12, 0.06)
COLUMNS = ["prompt_tokens", "preset", "ratio", "kept_tokens", "right", "total"]
NUM_LAYERS, BLOCK_SIZE = 4, 32
NUM_ANSWER_TOKENS = 8


def wilson(right: int, total: int) -> tuple[float, float]:
    """Bounds of the 95 % interval of a share (Wilson, 1927)."""
    z, share = 1.96, right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + (z / total / 2) ** 2)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def kept_tokens(config: CompressionConfig | None, num_tokens: int) -> int:
    """What really stays, averaged over layers: floors, forced tokens and whole blocks included."""
    if config is None:
        return num_tokens
    lengths = compaction_lengths(num_tokens, config, NUM_LAYERS, BLOCK_SIZE)
    return round(sum(num_tokens - (each.evicted if each else 0) for each in lengths) / NUM_LAYERS)


def setting_of(preset: str, ratio: float, changes: dict[str, Any] | None) -> CompressionConfig:
    """The preset at a ratio, compressing at the end of the prompt; tasks as for a question."""
    base = {"preset": preset, "layer_groups": {"size": 1}, "trigger": "end_of_prompt"}
    config = parse_config(base, changes)
    assert config is not None
    resolved = resolve_request(config, parse_request({"kv_budget_ratio": ratio}), "localization")
    assert resolved is not None
    return resolved


def read(path: Path) -> list[dict[str, str]]:
    """Rows measured so far."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def append(path: Path, rows: list[list[Any]]) -> None:
    """Add rows; the first line of a new file says what it was measured with."""
    is_new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            file.write("# " + json.dumps(describe()) + "\n")
            writer.writerow(COLUMNS)
        writer.writerows(rows)


def measure(args: argparse.Namespace) -> None:
    """All cells that are not in the file; one length after the other."""
    torch.set_num_threads(1)
    replay, tokenizer = Replay(MODEL, BLOCK_SIZE), AutoTokenizer.from_pretrained(MODEL)
    done = {(row["preset"], int(row["prompt_tokens"])) for row in read(args.out)}
    changes = json.loads(args.changes) if args.changes else None
    for length in args.lengths:
        presets = [p for p in args.presets or ["none", *preset_names()] if (p, length) not in done]
        cells: dict[tuple[str, float], CompressionConfig | None] = {}
        for preset in presets:
            for ratio in (1.0,) if preset == "none" else RATIOS:
                is_none = preset == "none"
                cells[preset, ratio] = None if is_none else setting_of(preset, ratio, changes)
        right = dict.fromkeys(cells, 0)
        samples = make_samples(args.num_samples, length, tokenizer.encode, seed=0)
        for sample in track(samples, f"{length} tokens", console=Console(stderr=True)):
            prompt = replay.prefill(tokenizer.encode(sample.prompt))
            for cell, config in cells.items():
                tokens = replay.generate(prompt, config, NUM_ANSWER_TOKENS)
                right[cell] += is_right(tokenizer.decode(tokens), sample.answer)
        rows = []
        for (preset, ratio), config in cells.items():
            kept, count = kept_tokens(config, length), right[preset, ratio]
            rows.append([length, preset + args.suffix, ratio, kept, count, len(samples)])
        append(args.out, rows)
        for row in rows:
            print(*row, flush=True)


def show(args: argparse.Namespace) -> None:
    """The table, one line per preset and length: right answers in percent, and their interval."""
    cells = {(r["preset"], int(r["prompt_tokens"]), float(r["ratio"])): r for r in read(args.out)}
    lengths = sorted({length for _, length, _ in cells})
    print("| preset | prompt | " + " | ".join(f"{ratio:.0%}" for ratio in RATIOS) + " |")
    print("|---|---|" + "---|" * len(RATIOS))
    for preset in dict.fromkeys(name for name, _, _ in cells):
        for length in lengths:
            ratios = (1.0,) if preset == "none" else RATIOS
            found = [cells.get((preset, length, ratio)) for ratio in ratios]
            if any(found):
                texts = [cell_text(cell) for cell in found]
                print(f"| `{preset}` | {length:,} | " + " | ".join(texts) + " |")


def cell_text(cell: dict[str, str] | None) -> str:
    """ "85 (64-95), 480 kept": percent right, 95 % interval, tokens that stay per layer."""
    if cell is None:
        return ""
    right, total = int(cell["right"]), int(cell["total"])
    low, high = wilson(right, total)
    return f"{right / total:.0%} ({100 * low:.0f}-{100 * high:.0f}), {cell['kept_tokens']}"


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("command", choices=["run", "show"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 4000])
    parser.add_argument("--num-samples", type=int, default=40)
    parser.add_argument("--presets", nargs="+")
    parser.add_argument("--changes", help="fields laid over the presets, as JSON")
    parser.add_argument("--suffix", default="", help="of the presets' names in the file")
    args = parser.parse_args()
    {"run": measure, "show": show}[args.command](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Exact answers on the needle task for every preset, budget and prompt length, with intervals.

    python scripts/policy_table.py run --out docs/benchmarks/policies_needle_cpu.csv
    python scripts/policy_table.py show --out docs/benchmarks/policies_needle_cpu.csv

`run` appends: cells that are in the file already are not measured again. `show` prints the table of
docs/policies.md. Real runs of the engine in this process: CPU, float32, the probe model, one layer
group per layer.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from show import MODEL, describe
from vllm_kvcompress.budgets import compaction_lengths
from vllm_kvcompress.config import parse_config, preset_names
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.scenarios import SERVER, needle_answers
from vllm_kvcompress.request_options import parse_request, resolve_request

RATIOS = (0.5, 0.25, 0.12, 0.06)
COLUMNS = ["prompt_tokens", "preset", "ratio", "kept_tokens", "right", "total"]
NUM_LAYERS, BLOCK_SIZE = 4, 32
PER_LAYER = {"layer_groups": {"size": 1}}


def wilson(right: int, total: int) -> tuple[float, float]:
    """Bounds of the 95 % interval of a share (Wilson, 1927)."""
    z, share = 1.96, right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + (z / total / 2) ** 2)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def kept_tokens(preset: Any, num_tokens: int, ratio: float) -> int:
    """What really stays, averaged over layers: floors, forced tokens and whole blocks included."""
    config = parse_config(preset)
    assert config is not None
    options = parse_request({"kv_budget_ratio": ratio})
    config = resolve_request(config, options, "localization")
    assert config is not None
    lengths = compaction_lengths(num_tokens, config, NUM_LAYERS, BLOCK_SIZE)
    return round(sum(num_tokens - (each.evicted if each else 0) for each in lengths) / NUM_LAYERS)


def server_setting(preset: str) -> Any:
    """The preset as the server's own setting, compressing at the end of the prompt."""
    return {"preset": preset, **PER_LAYER, "trigger": "end_of_prompt"}


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
    """Presets that compress prompts share an engine; others get one each, as its own setting."""
    done = {(row["preset"], int(row["prompt_tokens"])) for row in read(args.out)}
    presets = args.presets or preset_names()
    for length in args.lengths:
        todo = [name for name in presets if (name, length) not in done]
        shared = [name for name in todo if parse_config(name).compresses_prompts]  # type: ignore[union-attr]
        if shared:
            run_cells(args, length, server_setting("snapkv"), shared)
        for name in todo:
            if name not in shared:
                run_cells(args, length, server_setting(name), [SERVER], name)


def run_cells(
    args: argparse.Namespace,
    length: int,
    setting: Any,
    presets: Sequence[str],
    name: str | None = None,
) -> None:
    """All ratios of some presets at one length."""
    engine = Engine(MODEL, setting, kv_cache_memory_bytes=1 << 30, max_num_seqs=32)
    rows = needle_answers(
        engine,
        length,
        args.num_samples,
        presets,
        RATIOS,
        progress=lambda line: print(line, end="\r", file=sys.stderr, flush=True),
    )
    engine.close()
    cells = []
    for row in rows:
        if row.policy == "none":
            if name is None:  # once per length
                cells.append([length, "none", 1.0, length, row.right, row.total])
            continue
        preset = setting if row.policy == SERVER else row.policy
        kept = kept_tokens(
            preset if isinstance(preset, dict) else {"preset": preset, **PER_LAYER},
            length,
            row.ratio,
        )
        cells.append([length, name or row.policy, row.ratio, kept, row.right, row.total])
    append(args.out, cells)
    for cell in cells:
        print(*cell, flush=True)


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
    parser.add_argument("--num-samples", type=int, default=20)
    parser.add_argument("--presets", nargs="+")
    args = parser.parse_args()
    {"run": measure, "show": show}[args.command](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

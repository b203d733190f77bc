"""Exact answers on the needle task for every preset, budget and prompt length, with intervals.

    python scripts/policy_table.py run --out docs/benchmarks/policies_needle_cpu.csv
    python scripts/policy_table.py show --out docs/benchmarks/policies_needle_cpu.csv
    python scripts/policy_table.py run --table windowkv --out docs/benchmarks/windowkv_cpu.csv

`run` appends: cells that are in the file already are not measured again. `show` prints the table of
docs/benchmarks/policies.md. Probe model on CPU in float32, one layer group per layer; prompts are
prefilled and decoded by Hugging Face transformers, compressed in between by the worker's own code
(`vllm_kvcompress.evaluation.replay`, held against the engine by tests/e2e/test_replay.py). One
thread: with few cores, threads wait for each other longer than they compute.
"""

import argparse
import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoTokenizer

from lab.places import PROBE_MODEL
from vllm_kvcompress.config.reading import parse_config, preset_names
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core.classifier import TaskClassifier, head_and_tail
from vllm_kvcompress.evaluation.provenance import versions
from vllm_kvcompress.evaluation.quality.intervals import wilson
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.evaluation.tasks.needle import is_right, make_samples
from vllm_kvcompress.kernels.codebook.format import codes_per_row
from vllm_kvcompress.lengths.budgets import compaction_lengths, layer_groups
from vllm_kvcompress.request_options import parse_request, resolve_request

RATIOS = (0.5, 0.25, 0.12, 0.06)
COLUMNS = ["prompt_tokens", "preset", "ratio", "kept_tokens", "right", "total"]
NUM_LAYERS, BLOCK_SIZE = 4, 32
CODES_PER_ROW = codes_per_row(64 * 4)  # of the probe model's heads in float32
NUM_ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Variant:
    """One line of a table: a preset, what is changed in it, and how its task is decided."""

    name: str
    preset: str
    changes: dict[str, Any] | None = None
    task: str = "localization"

    def setting(self, ratio: float, task: str) -> CompressionConfig | None:
        """Its setting at a ratio, compressing at the end of the prompt; None compresses nothing."""
        if self.preset == "none":
            return None
        base = {"preset": self.preset, "layer_groups": {"size": 1}, "trigger": "end_of_prompt"}
        config = parse_config(base, self.changes)
        assert config is not None
        return resolve_request(config, parse_request({"kv_budget_ratio": ratio}), task)


def presets_table(args: argparse.Namespace) -> list[Variant]:
    """Every preset as it is."""
    return [Variant(name, name) for name in args.presets or ["none", *preset_names()]]


def windowkv_table(args: argparse.Namespace) -> list[Variant]:
    """WindowKV's switches, one at a time. The question asks for one number: localization."""
    released = {"shape": "windowkv", "form": "released", "gamma": 8}

    def changed(
        budget: dict[str, Any] = released, count: int | None = None, share: bool = True
    ) -> dict[str, Any]:
        """Windows of 32 in layer groups that share a ranking, and what differs from that."""
        policy = {"window_size": 32, "layers_per_leader": None, "share_indices": share}
        groups = {} if count is None else {"layer_groups": {"count": count}}
        return {"policy": policy, "layer_budget": budget, **groups}

    return [
        Variant("task: localization (right)", "windowkv", changed()),
        Variant("task: aggregation (wrong)", "windowkv", changed(), task="aggregation"),
        Variant("task: auto", "windowkv", changed(), task="auto"),
        Variant("windowkv_llama3, localization (right)", "windowkv_llama3"),
        Variant("windowkv_llama3, aggregation (wrong)", "windowkv_llama3", task="aggregation"),
        Variant("windowkv_llama3, auto", "windowkv_llama3", task="auto"),
        Variant("2 groups of 2 layers, shared", "windowkv", changed(count=2)),
        Variant("2 groups of 2 layers, not shared", "windowkv", changed(count=2, share=False)),
        Variant("1 group of 4 layers, shared", "windowkv", changed(count=1)),
        Variant("1 group of 4 layers, not shared", "windowkv", changed(count=1, share=False)),
        Variant("pyramid: released, gamma 8 (preset)", "windowkv", changed()),
        Variant(
            "pyramid: released, gamma 1 (as 4 groups of 1)",
            "windowkv",
            changed({**released, "gamma": 1}),
        ),
        Variant("pyramid: printed", "windowkv", changed({"shape": "windowkv", "form": "printed"})),
        Variant("pyramid: none (uniform)", "windowkv", changed({"shape": "uniform"})),
    ]


def kept_tokens(config: CompressionConfig | None, num_tokens: int) -> int:
    """Slots that stay, averaged over layers: floors, forced tokens and whole blocks included.

    A token takes one; entries and codes of a codebook stand for more tokens than they take slots.
    """
    if config is None:
        return num_tokens
    groups = layer_groups(NUM_LAYERS, config.layer_groups)
    lengths = compaction_lengths(num_tokens, config, max(groups) + 1, BLOCK_SIZE, CODES_PER_ROW)
    evicted = [lengths[group].evicted if lengths[group] else 0 for group in groups]  # type: ignore[union-attr]
    return round(num_tokens - sum(evicted) / NUM_LAYERS)


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
            file.write("# " + json.dumps(versions()) + "\n")
            writer.writerow(COLUMNS)
        writer.writerows(rows)


def measure(args: argparse.Namespace) -> None:
    """All cells that are not in the file; one length after the other."""
    torch.set_num_threads(1)
    model = str(PROBE_MODEL)
    replay, tokenizer = Replay(model, BLOCK_SIZE), AutoTokenizer.from_pretrained(model)
    done = {(row["preset"], int(row["prompt_tokens"])) for row in read(args.out)}
    for length in args.lengths:
        todo = [v for v in TABLES[args.table](args) if (v.name, length) not in done]
        right: dict[tuple[str, float], int] = {}
        samples = make_samples(args.num_samples, length, tokenizer.encode, seed=0)
        for sample in track(samples, f"{length} tokens", console=Console(stderr=True)):
            token_ids = tokenizer.encode(sample.prompt)
            ends = (tokenizer.decode(end) for end in head_and_tail(token_ids))
            found = TaskClassifier.load().classify(*ends)
            prompt = replay.prefill(token_ids)
            for variant in todo:
                task = found if variant.task == "auto" else variant.task
                for ratio in (1.0,) if variant.preset == "none" else RATIOS:
                    setting = variant.setting(ratio, task)
                    tokens = replay.generate(prompt, setting, NUM_ANSWER_TOKENS)
                    is_good = is_right(tokenizer.decode(tokens), sample.answer)
                    place = (variant.name, ratio)
                    right[place] = right.get(place, 0) + is_good
        rows = []
        for variant in todo:
            for ratio in (1.0,) if variant.preset == "none" else RATIOS:
                task = "localization" if variant.task == "auto" else variant.task
                kept = kept_tokens(variant.setting(ratio, task), length)
                count = right[variant.name, ratio]
                rows.append([length, variant.name, ratio, kept, count, len(samples)])
        append(args.out, rows)
        for row in rows:
            print(*row, flush=True)


TABLES = {"presets": presets_table, "windowkv": windowkv_table}


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
                texts = [cell_text(cell) for cell in found] + [""] * (len(RATIOS) - len(found))
                print(f"| {preset} | {length:,} | " + " | ".join(texts) + " |")


def cell_text(cell: dict[str, str] | None) -> str:
    """ "85 (64-95), 480 kept": percent right, 95 % interval, tokens that stay per layer."""
    if cell is None:
        return ""
    right, total = int(cell["right"]), int(cell["total"])
    share = wilson(right, total)
    low, high = share.low, share.high
    return f"{right / total:.0%} ({100 * low:.0f}-{100 * high:.0f}), {cell['kept_tokens']}"


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("command", choices=["run", "show"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 4000])
    parser.add_argument("--num-samples", type=int, default=40)
    parser.add_argument("--presets", nargs="+")
    parser.add_argument("--table", choices=TABLES, default="presets")
    args = parser.parse_args()
    {"run": measure, "show": show}[args.command](args)
    return 0

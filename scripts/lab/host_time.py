"""Host time of layer groups in every step: slots of requests, attention metadata of a batch.

    python scripts/bench_host.py --out FOLDER

One engine after another over a random model of 32 layers: stock vLLM, this plugin where no request
is compacted, then with 1, 4 and 32 layer groups, every group with another budget and every request
compacted. 16 requests decode. Measured per case, in time of the thread's own CPU:

* `step`, with ``--steps``: microseconds per decode step of 16 requests, median: all that the engine
  does but for the model's forward pass and the kernels that it launches, which a GPU would do.
  Engines take the GPU's path (lab/gpu_path) then, and compactions take minutes. Nothing is
  collected as garbage meanwhile: nearly all of it is the interpreter's.
* `schedule`: microseconds per decode step of 16 requests, median: all of the scheduler's work.
* `allocate_slots`: microseconds per decoding request and step, mean over all steps (one step in as
  many as a block has tokens takes blocks).
* `prepare_attn`: microseconds per decode step of 16 requests, median, with the metadata builders of
  vLLM's Triton attention, as a GPU has them (FlashAttention's are alike without its schedule), and
  how many times a builder was called.

All are Python, numpy and small tensors on the host, so a CPU shows them. Ratios within one round
are what counts. Each round measures every case, in an order that rotates.
"""

import argparse
import csv
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from rich.console import Console
from rich.table import Table

from lab.gpu_path.plugin import gpu_path
from lab.places import ROOT
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.provenance import provenance, public_words

NUM_LAYERS, NUM_REQUESTS, PROMPT_LEN, NUM_TOKENS, BLOCK = 32, 16, 256, 48, 32
MAX_POSITIONS = 2048
CASES: dict[str, int | None] = {
    "stock": None, "nothing evicted": 0, "1 group": 1, "4 groups": 4, "32 groups": 32
}  # fmt: skip
"""Layer groups of every case; 0 is one group whose requests are all left alone."""


@dataclass
class Measured:
    """Of one case.

    Attributes
    ----------
    step_us, schedule_us : list[float]
        One per decode step.
    allocate_us : list[float]
        One per decoding request and step.
    prepare_us : list[float]
        One per repetition.
    num_builds : int
        Calls of a metadata builder in one `prepare_attn`.
    """

    step_us: list[float] = field(default_factory=list)
    schedule_us: list[float] = field(default_factory=list)
    allocate_us: list[float] = field(default_factory=list)
    prepare_us: list[float] = field(default_factory=list)
    num_builds: int = 0


def make_model(folder: Path, num_layers: int = NUM_LAYERS) -> str:
    """A Llama of small layers; its weights are random ("dummy")."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def setting_of(num_groups: int | None) -> Mapping[str, Any] | None:
    """A setting under which every group keeps another number of tokens."""
    if num_groups is None:
        return None
    return {
        "preset": "keydiff",
        "budget": {"ratio": 0.5, "floor": 1},
        "min_prompt_len": 0 if num_groups else 10 * PROMPT_LEN,
        "layer_groups": {"count": max(num_groups, 1)},
        "layer_budget": {"shape": "pyramid"} if num_groups > 1 else {"shape": "uniform"},
    }


def run(model: str, num_groups: int | None, repetitions: int) -> Measured:
    """Measure one case."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import RequestStatus

    measured = Measured()
    allocate = KVCacheManager.allocate_slots

    def timed(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        is_decoding = (
            request.status == RequestStatus.RUNNING
            and request.num_computed_tokens >= request.num_prompt_tokens
        )
        start = time.thread_time()
        blocks = allocate(self, request, *args, **kwargs)
        if is_decoding:
            measured.allocate_us.append(1e6 * (time.thread_time() - start))
        return blocks

    engine = Engine(
        model, setting_of(num_groups), load_format="dummy", skip_tokenizer_init=True,
        max_model_len=1024, max_num_seqs=NUM_REQUESTS, max_num_batched_tokens=4096,
        block_size=BLOCK, kv_cache_memory_bytes=64 << 20,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    try:
        prompts = rng.integers(2, 512, (NUM_REQUESTS, PROMPT_LEN)).tolist()
        with patch.object(KVCacheManager, "allocate_slots", timed):
            for number, prompt in enumerate(prompts):
                engine.add(str(number), prompt, NUM_TOKENS, detokenize=False, ignore_eos=True)
            while len(engine.results[str(NUM_REQUESTS - 1)].token_ids) < 2:
                engine.step()
            schedule = engine.scheduler.schedule

            def timed_schedule(*args: Any, **kwargs: Any) -> Any:
                start = time.thread_time()
                output = schedule(*args, **kwargs)
                measured.schedule_us.append(1e6 * (time.thread_time() - start))
                return output

            with (
                patch.object(engine.scheduler, "schedule", timed_schedule),
                on_device(engine) as device,
            ):
                for _ in range(NUM_TOKENS // 2):
                    gc.collect()
                    gc.disable()
                    start, device.seconds = time.thread_time(), 0.0
                    engine.step()
                    seconds = time.thread_time() - start - device.seconds
                    gc.enable()
                    measured.step_us.append(1e6 * seconds)
            measure_metadata(engine, measured, repetitions)
            engine.drain()
    finally:
        engine.close()
    return measured


@dataclass
class Device:
    """Time of what a GPU would do itself."""

    seconds: float = 0.0


@contextmanager
def on_device(engine: Engine) -> Iterator[Device]:
    """Sum up the time of the model's forward pass and of interpreted kernels inside."""
    from triton.runtime.interpreter import InterpretedFunction

    device, starts = Device(), list[float]()
    launcher = InterpretedFunction.__getitem__

    def timed_launcher(self: Any, grid: Any) -> Any:
        launch = launcher(self, grid)

        def timed(*args: Any, **kwargs: Any) -> None:
            start = time.thread_time()
            launch(*args, **kwargs)
            if not starts:  # else it is a part of the forward pass
                device.seconds += time.thread_time() - start

        return timed

    def end(*args: Any) -> None:
        device.seconds += time.thread_time() - starts.pop()

    hooks = [
        engine.runner.model.register_forward_pre_hook(
            lambda *args: starts.append(time.thread_time())
        ),
        engine.runner.model.register_forward_hook(end),
    ]
    try:
        with patch.object(InterpretedFunction, "__getitem__", timed_launcher):
            yield device
    finally:
        for hook in hooks:
            hook.remove()


def measure_metadata(engine: Engine, measured: Measured, repetitions: int) -> None:
    """Build the metadata of the next step's batch many times over, as a GPU's backend does."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder as Builder

    runner = engine.runner
    prepare = runner.model_state.prepare_attn
    own = [group for groups in runner.attn_groups for group in groups]
    builders = [group.metadata_builders for group in own]
    build = Builder.build

    def spy(batch: Any, *args: Any, **kwargs: Any) -> Any:
        for group in own:
            spec, names = group.kv_cache_spec, group.layer_names
            made = Builder(spec, names, runner.vllm_config, runner.device)
            group.metadata_builders = [made]

        def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
            measured.num_builds += 1
            return build(self, *args, **kwargs)

        with patch.object(Builder, "build", counting):
            prepare(batch, *args, **kwargs)
        for _ in range(repetitions):
            start = time.thread_time()
            prepare(batch, *args, **kwargs)
            measured.prepare_us.append(1e6 * (time.thread_time() - start))
        for group, before in zip(own, builders, strict=True):
            group.metadata_builders = before
        return prepare(batch, *args, **kwargs)

    with patch.object(runner.model_state, "prepare_attn", spy):
        engine.step()


def rows(results: Mapping[tuple[int, str], Measured], steps: bool) -> list[dict[str, Any]]:
    """One line per round and case; whole steps only where they were measured."""
    return [
        {
            "round": number,
            "case": name,
            **({"step_us": round(statistics.median(each.step_us), 1)} if steps else {}),
            "schedule_us": round(statistics.median(each.schedule_us), 1),
            "allocate_slots_us": round(statistics.fmean(each.allocate_us), 2),
            "prepare_attn_us": round(statistics.median(each.prepare_us), 1),
            "builder_calls": each.num_builds,
        }
        for (number, name), each in results.items()
    ]


TIMES = ("step_us", "schedule_us", "allocate_slots_us", "prepare_attn_us")


def ratios(lines: list[dict[str, Any]], case: str, base: str, key: str) -> list[float]:
    """Of each round: a case's time over that of another."""
    found = {(line["round"], line["case"]): line[key] for line in lines}
    numbers = sorted({number for number, _ in found})
    return [found[number, case] / found[number, base] for number in numbers]


def show(lines: list[dict[str, Any]], console: Console) -> None:
    """Print medians over rounds, and of the ratios to stock and to one group of a round."""
    cases = list(dict.fromkeys(line["case"] for line in lines))
    bases = [base for base in ("stock", "1 group") if base in cases]
    table = Table("case")
    times = [key for key in TIMES if key in lines[0]]
    for key in times:
        for title in (key.replace("_us", ", us"), *(f"x {base}" for base in bases)):
            table.add_column(title, justify="right")
    table.add_column("builder calls", justify="right")
    for case in sorted(cases, key=list(CASES).index):
        own, cells = [line for line in lines if line["case"] == case], [case]
        for key in times:
            cells.append(f"{statistics.median(line[key] for line in own):.1f}")
            for base in bases:
                cells.append(f"{statistics.median(ratios(lines, case, base, key)):.2f}")
        table.add_row(*cells, str(max(line["builder_calls"] for line in own)))
    console.print(table)


def main() -> None:
    """Measure every case, print a table, write host.csv and run.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="new folder for host.csv and run.json")
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--steps", action="store_true", help="measure whole steps as well")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    results: dict[tuple[int, str], Measured] = {}
    path = gpu_path() if args.steps else nullcontext()
    with tempfile.TemporaryDirectory() as folder, path:
        model = make_model(Path(folder))
        for number in range(args.rounds):
            first = number % len(args.cases)
            for name in args.cases[first:] + args.cases[:first]:
                results[number + 1, name] = run(model, CASES[name], args.repetitions)
    lines = rows(results, args.steps)
    show(lines, Console(width=170))
    if args.out is not None:
        args.out.mkdir(parents=True)
        with (args.out / "host.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)
        command = " ".join(["python", *public_words(sys.argv, ROOT)])
        about = provenance(command, ROOT)
        (args.out / "run.json").write_text(json.dumps(about, indent=1) + "\n")

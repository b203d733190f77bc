"""Host time of a decode step where nothing is evicted, against stock vLLM's, step by step in turns.

    python scripts/lab/step_time.py --out FOLDER

All engines are open in one process, over one random model, and 16 requests decode in each. One
step of every engine is a round, in an order that turns around, so that whatever else the machine
does hits all alike; a second stock engine shows how far two equal ones differ. Time is the
thread's own CPU time, and what a GPU would do itself is taken off: the model's forward pass, and
launches of kernels, which Triton's interpreter runs here. Left is Python, numpy and small tensors,
which a host with a GPU runs too.

Cases: `left alone`, prompts below `min_prompt_len`; `ratio 1.0`, a budget that keeps everything;
`opted out`, by request; `armed`, a compaction is due after many more tokens; `pressure`, memory is
ample. A server with `none` has nothing of the plugin in its steps: it is stock.
"""

import argparse
import csv
import gc
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":  # as a file: Python puts this folder on its path, `lab` is one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from rich.console import Console
from rich.table import Table

from lab import host_time
from lab.gpu_path.plugin import gpu_path
from lab.places import ROOT
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.provenance import provenance, public_words

NUM_REQUESTS, PROMPT_LEN, NUM_LAYERS = 16, 256, 8
_SETTING: Mapping[str, Any] = {
    "preset": "snapkv", "budget": {"ratio": 0.5, "floor": 1}, "min_prompt_len": 0
}  # fmt: skip
CASES: dict[str, tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]] = {
    "stock": (None, None),
    "stock again": (None, None),
    "left alone": ({**_SETTING, "min_prompt_len": 100 * PROMPT_LEN}, None),
    "ratio 1.0": (_SETTING, {"kv_budget_ratio": 1.0}),
    "opted out": (_SETTING, {"kv_compression": "none"}),
    "armed": ({**_SETTING, "trigger": "interval", "interval": 4096}, None),
    "pressure": ({**_SETTING, "trigger": "pressure"}, None),
}
"""Setting of the server, and ``vllm_xargs`` of its requests."""

PHASES = ("schedule", "execute_model", "sample_tokens", "update_from_output", "step")
"""Of the scheduler, of the worker (the middle two), and all that the engine does."""

Step = dict[str, float]


class Clock:
    """Microseconds of the host in functions of an engine, without what a GPU would do inside.

    Attributes
    ----------
    launches : int
        Kernels that were launched, those of the forward pass left out.
    """

    def __init__(self) -> None:
        self.launches = 0
        self._device, self._is_inside = 0.0, False
        self.found: Step = defaultdict(float)

    def of_device(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Take the time of a function off."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return function(*args, **kwargs)
            self._is_inside, start = True, time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._is_inside = False
                self._device += time.thread_time() - start

        return timed

    def phase(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Note the time of a function under `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start, device = time.thread_time(), self._device
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.thread_time() - start - (self._device - device)
                self.found[name] += 1e6 * seconds

        return timed

    @contextmanager
    def without_launches(self) -> Iterator[None]:
        """Take off what Triton's interpreter does, its preparations of a launch included."""
        from triton.runtime.interpreter import InterpretedFunction

        launcher = self.of_device(InterpretedFunction.__getitem__)

        def prepared(function: Any, grid: Any) -> Any:
            self.launches += not self._is_inside
            return self.of_device(launcher(function, grid))

        with patch.object(InterpretedFunction, "__getitem__", prepared):
            yield


def open_engine(model: str, case: str) -> Engine:
    """An engine whose requests have just begun to decode."""
    setting, xargs = CASES[case]
    engine = Engine(
        model, setting, load_format="dummy", skip_tokenizer_init=True,
        max_model_len=host_time.MAX_POSITIONS, max_num_seqs=NUM_REQUESTS,
        max_num_batched_tokens=NUM_REQUESTS * PROMPT_LEN, block_size=host_time.BLOCK,
        kv_cache_memory_bytes=128 << 20,
    )  # fmt: skip
    prompts = np.random.default_rng(0).integers(2, 512, (NUM_REQUESTS, PROMPT_LEN)).tolist()
    room = host_time.MAX_POSITIONS - PROMPT_LEN
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, room, xargs, detokenize=False, ignore_eos=True)
    while len(engine.results[str(NUM_REQUESTS - 1)].token_ids) < 3:
        engine.step()
    return engine


def watch(engine: Engine, clock: Clock) -> None:
    """Time one engine's phases."""
    scheduler, runner = engine.scheduler, engine.runner
    runner.model.forward = clock.of_device(runner.model.forward)
    for owner, names in (
        (scheduler, ("schedule", "update_from_output")),
        (runner, ("execute_model", "sample_tokens")),
    ):
        for name in names:
            setattr(owner, name, clock.phase(name, getattr(owner, name)))
    engine.engine.step = clock.phase("step", engine.engine.step)


def measure(model: str, cases: list[str], num_rounds: int) -> dict[str, list[Step]]:
    """One `Step` per round and case."""
    clock = Clock()
    engines = {case: open_engine(model, case) for case in cases}
    for engine in engines.values():
        watch(engine, clock)
    found: dict[str, list[Step]] = {case: [] for case in cases}
    with clock.without_launches():
        for number in range(-5, num_rounds):  # the first ones are not counted
            gc.collect()
            gc.disable()
            for case in cases if number % 2 else cases[::-1]:
                clock.found, clock.launches = defaultdict(float), 0
                engines[case].step()
                if number >= 0:
                    found[case].append({**clock.found, "launches": clock.launches})
            gc.enable()
    for case, engine in engines.items():
        if CASES[case][0] is not None:
            evicted = engine.runner.model_state.lengths.evicted.np
            assert not evicted.any(), f"{case}: something was evicted"
    return found


def rows(found: Mapping[str, list[Step]]) -> list[dict[str, Any]]:
    """One line per case: medians, and medians of the ratios to stock's step of the same round."""
    lines = []
    for case, steps in found.items():
        line: dict[str, Any] = {"case": case, "rounds": len(steps)}
        for phase in PHASES:
            own = [step[phase] for step in steps]
            ratios = [a / b[phase] for a, b in zip(own, found["stock"], strict=True)]
            line[f"{phase}_us"] = round(statistics.median(own), 1)
            line[f"{phase}_ratio"] = round(statistics.median(ratios), 3)
        line["launches"] = int(statistics.median(step["launches"] for step in steps))
        lines.append(line)
    return lines


def show(lines: list[dict[str, Any]], console: Console) -> None:
    """Print a table."""
    table = Table("case")
    for phase in PHASES:
        table.add_column(f"{phase}, us", justify="right")
        table.add_column("x stock", justify="right")
    table.add_column("launches", justify="right")
    for line in lines:
        cells = [line["case"]]
        for phase in PHASES:
            cells += [f"{line[f'{phase}_us']:.0f}", f"{line[f'{phase}_ratio']:.3f}"]
        table.add_row(*cells, str(line["launches"]))
    console.print(table)


def main() -> None:
    """Measure, print a table, write steps.csv and run.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="new folder for steps.csv and run.json")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, gpu_path():
        model = host_time.make_model(Path(folder), NUM_LAYERS)
        lines = rows(measure(model, list(dict.fromkeys(["stock", *args.cases])), args.rounds))
    show(lines, Console(width=170))
    if args.out is not None:
        args.out.mkdir(parents=True)
        with (args.out / "steps.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)
        about = provenance(" ".join(["python", *public_words(sys.argv, ROOT)]), ROOT)
        (args.out / "run.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()

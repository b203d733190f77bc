"""Host time of layer groups in turns: 32 of them against one, in one process.

    python scripts/lab/group_time.py --out FOLDER

As lab/host_time.py, whose model, settings and requests these are: an engine for each number of
groups is open at once, every request is compacted, 16 decode. The engines take turns, so that what
else the machine does hits all alike, and ratios are taken within a turn:

* `allocate_slots`: per decoding request, mean over a period of as many steps as a block has
  tokens (one of them takes blocks). Steps take turns.
* `prepare_attn`: of the last step's batch, with the metadata builders of vLLM's Triton attention,
  as a GPU has them. A turn is the median of some calls by each engine.

Time is the thread's own CPU time.
"""

import argparse
import csv
import gc
import json
import statistics
import sys
import tempfile
import time
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

from lab.host_time import BLOCK, NUM_REQUESTS, PROMPT_LEN, make_model, setting_of
from lab.places import ROOT
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.provenance import provenance, public_words

MAX_LEN, CALLS = 1024, 20
Turn = Mapping[int, float]
"""Microseconds by number of groups."""


def open_engine(model: str, num_groups: int) -> Engine:
    """An engine whose requests have been compacted and have just begun to decode."""
    engine = Engine(
        model, setting_of(num_groups), load_format="dummy", skip_tokenizer_init=True,
        max_model_len=MAX_LEN, max_num_seqs=NUM_REQUESTS, max_num_batched_tokens=4096,
        block_size=BLOCK, kv_cache_memory_bytes=64 << 20,
    )  # fmt: skip
    prompts = np.random.default_rng(0).integers(2, 512, (NUM_REQUESTS, PROMPT_LEN)).tolist()
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, MAX_LEN - PROMPT_LEN, detokenize=False, ignore_eos=True)
    while len(engine.results[str(NUM_REQUESTS - 1)].token_ids) < 3:
        engine.step()
    evicted = engine.runner.model_state.lengths.evicted.np
    assert evicted[:, :NUM_REQUESTS].any(axis=0).all(), "not every request was compacted"
    return engine


@contextmanager
def allocations() -> Iterator[list[float]]:
    """Microseconds of every call of `allocate_slots` inside."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    allocate, found = KVCacheManager.allocate_slots, list[float]()

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        blocks = allocate(self, *args, **kwargs)
        found.append(1e6 * (time.thread_time() - start))
        return blocks

    with patch.object(KVCacheManager, "allocate_slots", timed):
        yield found


def time_allocations(engines: Mapping[int, Engine], periods: int) -> list[Turn]:
    """A turn per period: means of all calls in as many steps as a block has tokens."""
    turns: list[Turn] = []
    with allocations() as found:
        for _ in range(periods):
            sums = dict.fromkeys(engines, 0.0)
            for step in range(BLOCK):
                gc.collect()
                gc.disable()
                for groups in list(engines) if step % 2 else list(engines)[::-1]:
                    found.clear()
                    engines[groups].step()
                    assert len(found) == NUM_REQUESTS
                    sums[groups] += sum(found)
                gc.enable()
            turns.append({groups: total / NUM_REQUESTS / BLOCK for groups, total in sums.items()})
    return turns


def metadata_call(engine: Engine) -> tuple[Callable[[], Any], int, Callable[[], None]]:
    """What makes the metadata of a step's batch, how many builds it takes, and the way back."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder as Builder

    runner, calls, build = engine.runner, list[Any](), Builder.build
    prepare = runner.model_state.prepare_attn

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return prepare(*args, **kwargs)

    with patch.object(runner.model_state, "prepare_attn", spy):
        engine.step()
    attn_groups = [group for groups in runner.attn_groups for group in groups]
    before = [group.metadata_builders for group in attn_groups]
    for group in attn_groups:
        spec, names = group.kv_cache_spec, group.layer_names
        group.metadata_builders = [Builder(spec, names, runner.vllm_config, runner.device)]
    runner.model_state._families = None  # it has compared the builders that were here before
    args, kwargs = calls[-1]
    built: list[None] = []

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        built.append(None)
        return build(self, *args, **kwargs)

    with patch.object(Builder, "build", counting):
        prepare(*args, **kwargs)

    def put_back() -> None:
        for group, builders in zip(attn_groups, before, strict=True):
            group.metadata_builders = builders
        runner.model_state._families = None

    return (lambda: prepare(*args, **kwargs)), len(built), put_back


def time_metadata(calls: Mapping[int, Callable[[], Any]], num_turns: int) -> list[Turn]:
    """A turn: the median of some calls of each."""
    turns: list[Turn] = []
    for number in range(num_turns):
        gc.collect()
        gc.disable()
        turn = {}
        for groups in list(calls) if number % 2 else list(calls)[::-1]:
            times = []
            for _ in range(CALLS):
                start = time.thread_time()
                calls[groups]()
                times.append(1e6 * (time.thread_time() - start))
            turn[groups] = statistics.median(times)
        gc.enable()
        turns.append(turn)
    return turns


def line_of(name: str, groups: int, turns: list[Turn], builds: int | str) -> dict[str, Any]:
    """Median time, and median and quartiles of the ratio to one group."""
    ratios = [turn[groups] / turn[1] for turn in turns]
    low, high = np.quantile(ratios, [0.25, 0.75]).tolist()
    return {
        "function": name, "groups": groups, "turns": len(turns),
        "median_us": round(statistics.median(turn[groups] for turn in turns), 2),
        "ratio": round(statistics.median(ratios), 3), "ratio_q1": round(low, 3),
        "ratio_q3": round(high, 3), "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3), "builder_calls": builds,
    }  # fmt: skip


def main() -> None:
    """Measure, print a table, write groups.csv and run.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="new folder for groups.csv and run.json")
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--periods", type=int, default=8, help="of allocate_slots")
    parser.add_argument("--turns", type=int, default=100, help="of prepare_attn")
    args = parser.parse_args()
    numbers = list(dict.fromkeys([1, *args.groups]))
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        engines = {groups: open_engine(model, groups) for groups in numbers}
        gc.freeze()  # what is here by now is not looked at again and again
        made = {groups: metadata_call(engine) for groups, engine in engines.items()}
        prepared = time_metadata(
            {groups: call for groups, (call, _, _) in made.items()}, args.turns
        )
        lines = [line_of("prepare_attn", groups, prepared, made[groups][1]) for groups in numbers]
        print(*lines, sep="\n", flush=True)
        for _, _, put_back in made.values():
            put_back()
        allocated = time_allocations(engines, args.periods)
        lines += [line_of("allocate_slots", groups, allocated, "") for groups in numbers]
    table = Table(*(key.replace("_", " ") for key in lines[0]))
    for line in lines:
        table.add_row(*map(str, line.values()))
    Console(width=140).print(table)
    if args.out is not None:
        args.out.mkdir(parents=True)
        with (args.out / "groups.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
        about = provenance(" ".join(["python", *public_words(sys.argv, ROOT)]), ROOT)
        (args.out / "run.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()

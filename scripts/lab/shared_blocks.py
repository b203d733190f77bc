"""What it costs to compact requests that share blocks at their marks: blocks held, and steps.

    python scripts/lab/shared_blocks.py

vLLM's own scheduler and ours on top, without workers: the tokens are made up here, so the counts
are exact and the same on every machine. Requests come all at once: with one prompt of 2,500 tokens,
or with a common system prompt of 2,000 or 2,400 and the rest of their own. Each is compressed when
its prompt ends and generates 200 tokens. Blocks have 32 tokens.

For stock vLLM, and for each setting of `shared_blocks`: the most blocks that were held in an ample
pool, those held once all prompts are done, and compactions; steps and preemptions in a pool of
`--pool` blocks.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a file: Python puts this folder on its path, `lab` is one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lab.scheduler_time import add, make_scheduler

COUNTS, RATIOS = (2, 8, 32), (0.25, 0.12)
PROMPT_LEN, NUM_OUTPUT = 2500, 200
AMPLE = 6000
SHAPES = {"one prompt": 2500, "common system prompt": 2000, "short questions": 2400}
"""Tokens that prompts begin with alike."""


def _prompts(common: int, count: int) -> list[list[int]]:
    rest = PROMPT_LEN - common
    return [_tokens(common, 0) + _tokens(rest, 1 + number) for number in range(count)]


def _tokens(length: int, seed: int) -> list[int]:
    return [20 + (1009 * seed + place * (seed + 1)) % 4001 for place in range(length)]


@dataclass
class Counts:
    """What a run came to.

    Attributes
    ----------
    peak : int
        Most blocks that requests held at once.
    settled : int
        Those that they held when the last prompt had been computed for two steps.
    compactions, steps, preemptions : int
        Of the whole run.
    """

    peak: int = 0
    settled: int = 0
    compactions: int = 0
    steps: int = 0
    preemptions: int = 0


def run(
    prompts: Sequence[list[int]], ratio: float, shared_blocks: str | None, num_blocks: int
) -> Counts:
    """Serve these prompts to their end; without `shared_blocks` by stock vLLM."""
    setting = {
        "preset": "keydiff", "budget": {"ratio": ratio, "floor": 1}, "min_prompt_len": 0,
        "shared_blocks": shared_blocks,
    } if shared_blocks else None  # fmt: skip
    scheduler = make_scheduler(setting, 1 + num_blocks, max_num_seqs=64)
    add(scheduler, prompts, NUM_OUTPUT)
    requests, found, num_behind = list(scheduler.requests.values()), Counts(), 0
    while scheduler.requests:
        _step(scheduler)
        pool = scheduler.kv_cache_manager.block_pool
        num_held = num_blocks - pool.get_num_free_blocks()
        found.steps += 1
        found.peak = max(found.peak, num_held)
        num_behind += all(each.num_output_tokens for each in requests)
        if num_behind == 2:
            found.settled = num_held
    found.preemptions = sum(each.num_preemptions for each in requests)
    if setting is not None:
        found.compactions = sum(scheduler.stats.compactions.values())
        assert scheduler.stats.deferrals == 0
    return found


def _step(scheduler: Any) -> None:
    from vllm.v1.outputs import ModelRunnerOutput

    output = scheduler.schedule()
    names = list(output.num_scheduled_tokens)
    tokens = [[] if scheduler.requests[name].is_prefill_chunk else [30] for name in names]
    results = ModelRunnerOutput(names, {name: n for n, name in enumerate(names)}, tokens)
    scheduler.update_from_output(output, results)


def main() -> int:
    """Print a row for each case and setting; 1 if a compaction was left out with `always`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=int, default=200, help="blocks of the small pool")
    args = parser.parse_args()
    print("prompts,requests,kept,shared_blocks,peak,settled,compactions,steps,preemptions")
    complete = True
    cases = [(1.0, None), *((r, which) for r in RATIOS for which in ("when_it_pays", "always"))]
    for shape, common in SHAPES.items():
        for count in COUNTS:
            prompts = _prompts(common, count)
            for ratio, shared_blocks in cases:
                ample = run(prompts, ratio, shared_blocks, AMPLE)
                small = run(prompts, ratio, shared_blocks, args.pool)
                print(
                    f"{shape},{count},{ratio:g},{shared_blocks or 'stock'},{ample.peak},"
                    f"{ample.settled},{ample.compactions},{small.steps},{small.preemptions}",
                    flush=True,
                )
                complete &= shared_blocks != "always" or ample.compactions == count
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())

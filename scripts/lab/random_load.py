"""Random load against an engine in this process, whose books are checked after every step.

    python scripts/lab/random_load.py --mode draft-copied --seconds 600 --seed 0

Requests of all kinds arrive, some are aborted, the prefix cache is emptied now and then, and the
pool has little more room than one request of the longest length needs: everything is preempted,
put off and tried again. The same seed gives the same course of events; a failure says at which step
it happened. To try another state of the package, put its folder into PYTHONPATH.
"""

import argparse
import json
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a file: Python puts this folder on its path, `lab` is one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lab.load_checks import (
    LoadError,
    Progress,
    check_blocks,
    check_empty,
    num_missing,
    step_limit,
)
from lab.load_traffic import BLOCK_SIZE, MAX_MODEL_LEN, MAX_OUTPUT, MODES, NGRAM, Arrival, Traffic
from lab.places import PROBE_MODEL
from lab.row_marks import RowMarks
from vllm_kvcompress.evaluation.engine import Engine, Result

MAX_IN_FLIGHT = 16
SEQS = (8, 16, 4)
"""Values of max_num_seqs; the seed picks one."""


@dataclass(frozen=True)
class Load:
    """What a run is made of.

    Attributes
    ----------
    mode : str
        One of `MODES`.
    seed : int
        Of all random draws.
    pool : float
        Blocks of the pool, in requests of the longest length.
    max_num_seqs : int or None
        Most running requests; None lets the seed choose.
    async_scheduling : bool
        Schedule one step ahead.
    max_output : int
        Most tokens a request generates.
    marks : bool
        Mark every row of the cache and look at all that attention reads (row_marks.py).
    """

    mode: str
    seed: int = 0
    pool: float = 1.2
    max_num_seqs: int | None = None
    async_scheduling: bool = False
    max_output: int = MAX_OUTPUT
    marks: bool = False

    @property
    def command(self) -> str:
        """How to run it again, but for the number of steps."""
        words = ["python scripts/lab/random_load.py --mode", self.mode, "--seed", str(self.seed)]
        words += ["--pool", f"{self.pool:g}"]
        if self.max_num_seqs is not None:
            words += ["--max-num-seqs", str(self.max_num_seqs)]
        if self.max_output != MAX_OUTPUT:
            words += ["--max-output", str(self.max_output)]
        words += ["--marks"] * self.marks
        return " ".join(words + ["--async-scheduling"] * self.async_scheduling)


@dataclass
class Report:
    """What came of a run."""

    mode: str
    command: str
    seconds: float = 0.0
    steps: int = 0
    finished: int = 0
    aborted: int = 0
    refused: int = 0
    resets: int = 0
    preemptions: int = 0
    compactions: int = 0
    views: int = 0
    deferrals: int = 0
    blocks_missing: int = 0
    rows_read: int = 0
    failures: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    uncompressed: dict[str, int] = field(default_factory=dict)

    def line(self) -> str:
        """One line for a terminal."""
        return (
            f"{self.mode}: {self.seconds:.0f} s, {self.steps} steps, {self.finished} requests "
            f"finished, {self.aborted} aborted, {self.refused} refused, {self.resets} resets, "
            f"{self.preemptions} preemptions, {self.compactions} compactions, {self.views} views, "
            f"{self.deferrals} deferrals, {len(self.failures)} failures, "
            f"{self.blocks_missing} blocks missing"
            + (f", {self.rows_read} rows looked at" if self.rows_read else "")
        )


class Run:
    """A run of random load.

    Parameters
    ----------
    engine : Engine
        As `opened` gives it.
    load : Load
        What it is made of.
    """

    def __init__(self, engine: Engine, load: Load) -> None:
        self.engine, self.load = engine, load
        self.rng = random.Random(load.seed)
        mode = MODES[load.mode]
        config = engine.engine.vllm_config
        self.traffic = Traffic(
            self.rng, config, mode.setting, load.max_output, mode.has_reuse, not load.marks
        )
        self.marks = RowMarks(engine) if load.marks else None
        self.progress = Progress()
        self.arrivals: dict[str, Arrival] = {}
        self.names: set[str] = set()
        self.report = Report(load.mode, load.command)

    def run(
        self,
        max_steps: int | None,
        max_seconds: float | None,
        show: Callable[[Report], None] = lambda report: None,
    ) -> Report:
        """Send load for so many steps or seconds, then let the engine run empty."""
        report, start = self.report, time.monotonic()
        try:
            while (max_steps is None or report.steps < max_steps) and (
                max_seconds is None or report.seconds < max_seconds
            ):
                self._arrive()
                self._step()
                self._abort()
                self._reset()
                report.seconds = time.monotonic() - start
                show(report)
            while self.engine.engine.has_unfinished_requests():
                self._step()
                self._abort()
            self._step()  # the worker hears of the last requests
            check_empty(self.engine, self.names.__contains__)
        except Exception as error:  # whatever ends the engine is what this looks for
            kind = "" if isinstance(error, LoadError) else f"{type(error).__name__}: "
            report.failures.append(f"step {report.steps}: {kind}{error}")
            report.failures.append(traceback.format_exc())
            report.requests = [str(self.arrivals[name]) for name in self._live()]
        self._count(time.monotonic() - start)
        return report

    def _count(self, seconds: float) -> None:
        report, stats = self.report, self.engine.scheduler.stats
        report.seconds = seconds
        results = [self.engine.results[name] for name in self.arrivals]
        report.finished = sum(result.finished for result in results)
        report.preemptions = self.engine.num_preemptions
        report.compactions = sum(stats.compactions.values())
        report.views, report.deferrals = sum(stats.views.values()), stats.deferrals
        report.uncompressed = dict(stats.uncompressed)
        report.blocks_missing = num_missing(self.engine)
        report.rows_read = 0 if self.marks is None else self.marks.num_rows

    # --- what happens ---------------------------------------------------------------------

    def _live(self) -> dict[str, Any]:
        """Arrivals in the engine by name, with one request of each that the scheduler holds."""
        # A sibling is called after its number and its parent.
        return {name.split("_", 1)[-1]: request for name, request in self.engine.live().items()}

    def _arrive(self) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        engine = self.engine
        while len(engine.scheduler.requests) < MAX_IN_FLIGHT and self.rng.random() < 0.5:
            arrival = self.traffic.arrival()
            self.arrivals[arrival.name] = arrival
            engine.results[arrival.name] = Result()
            prompt = {"prompt_token_ids": arrival.prompt}
            params = SamplingParams(**arrival.sampling)
            try:
                engine.engine.add_request(arrival.name, prompt, params)
            except VLLMValidationError as error:
                if error.parameter != "input_tokens":
                    raise
                del self.arrivals[arrival.name], engine.results[arrival.name]
                self.report.refused += 1  # the pool is smaller than the longest sequence
            except ValueError as error:
                raise SystemExit(
                    f"the traffic is wrong, not the engine: {arrival}: {error}"
                ) from None
            self.names |= engine.scheduler.requests.keys()

    def _step(self) -> None:
        with step_limit():
            self.engine.step()
        self.report.steps += 1
        if self.marks is not None:
            self.marks.check()
        self.engine.scheduler.check_integrity()
        check_blocks(self.engine)
        self.progress.check(self.engine.scheduler.requests)

    def _abort(self) -> None:
        for name, request in self._live().items():
            fate = self.arrivals[name].fate
            computed, prompt_len = request.num_computed_tokens, request.num_prompt_tokens
            is_time = (
                (fate == "prefill" and 0 < computed < prompt_len)
                or (fate == "prompt_end" and computed >= prompt_len)
                or (fate == "decode" and request.num_output_tokens > 2)
                or (fate == "any" and self.rng.random() < 0.02)
            )
            if is_time:
                self.engine.abort(name)
                self.report.aborted += 1
                self.engine.scheduler.check_integrity()
                check_blocks(self.engine)

    def _reset(self) -> None:
        """Empty the prefix cache, where running requests allow it or at their expense."""
        chance = self.rng.random()
        if chance < 0.02:
            self.engine.scheduler.reset_prefix_cache(reset_running_requests=chance < 0.007)
            self.report.resets += 1
            self.engine.scheduler.check_integrity()
            check_blocks(self.engine)


@contextmanager
def opened(load: Load) -> Iterator[Engine]:
    """An engine for a run, closed at the end."""
    mode = MODES[load.mode]
    arguments = dict(mode.engine_args or {})
    if load.async_scheduling and arguments.get("speculative_config") == NGRAM:
        # The same drafter in model runner V2; of the two names the one that vLLM schedules ahead.
        arguments["speculative_config"] = NGRAM | {"method": "ngram_gpu"}
    blocks = int(mode.num_groups * -(-MAX_MODEL_LEN // BLOCK_SIZE) * load.pool)
    engine = Engine(
        str(PROBE_MODEL),
        mode.setting,
        num_blocks=1 + blocks,
        async_scheduling=load.async_scheduling,
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
        max_num_seqs=load.max_num_seqs or SEQS[load.seed % len(SEQS)],
        **arguments,
    )
    try:
        yield engine
    finally:
        engine.close()


def main() -> int:
    """Run what the command line says; 1 if anything failed."""
    from rich.progress import Progress as Bar

    parser = argparse.ArgumentParser(description="random load against an engine, books checked")
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--seconds", type=float, help="how long to send load (default 600)")
    parser.add_argument("--steps", type=int, help="steps of load, in the place of --seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=float, default=1.2, help="in requests of longest length")
    parser.add_argument("--max-num-seqs", type=int, help="default: the seed chooses")
    parser.add_argument("--max-output", type=int, default=MAX_OUTPUT, help="tokens per request")
    parser.add_argument("--async-scheduling", action="store_true")
    parser.add_argument("--marks", action="store_true", help="mark and check rows of the cache")
    parser.add_argument("--json", type=Path, help="file for the report")
    args = parser.parse_args()
    seconds = args.seconds if args.seconds or args.steps else 600.0
    load = Load(
        args.mode, args.seed, args.pool, args.max_num_seqs, args.async_scheduling, args.max_output,
        args.marks,
    )  # fmt: skip
    with opened(load) as engine, Bar() as bar:
        task = bar.add_task(load.mode, total=args.steps or seconds)

        def show(report: Report) -> None:
            bar.update(task, completed=report.steps if args.steps else report.seconds)

        report = Run(engine, load).run(args.steps, seconds, show)
    print(report.line())
    if args.json:
        args.json.write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
    if report.failures:
        print(*report.failures, "requests in flight:", *report.requests, sep="\n")
        print(f"again: {load.command} --steps {report.steps + 1}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())

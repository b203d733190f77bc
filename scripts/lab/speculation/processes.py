"""Engines of ``scripts/bench_speculation.py``, each in a process of its own.

A `Child` starts a process, which runs `serve`: an engine and its `Meter`, and `measure` for every
batch it is sent. On a GPU neither torch nor vLLM is imported before that process has set its
environment; on a CPU they are imported once, and the processes are forked.
"""

import contextlib
import multiprocessing
import os
import traceback
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lab.servers import stock_plugins
from lab.serving.client import BenchError
from lab.speculation.engines import DRAFT, Meter, measure

ON_CPU = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Environment. With few cores, threads wait for each other longer than they compute."""


def serve(connection: Any, variant: str, options: dict[str, Any]) -> None:
    """An engine's process: answer each batch with its measurements, until told to stop.

    Parameters
    ----------
    connection : multiprocessing.connection.Connection
        Gets (prompts, output_len) or None to stop. Sends None once the engine runs, then what
        `measure` returns; a string says what went wrong.
    variant : str
        One of `VARIANTS`.
    options : dict
        As for `Child`.
    """
    log = os.open(options["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if variant != DRAFT:
        os.environ["VLLM_PLUGINS"] = stock_plugins()
    try:
        from vllm_kvcompress.evaluation.engine import Engine

        engine = Engine(options["model"], options["setting"], **options["engine"])
        meter = Meter(engine, options["on_gpu"], options["prompt_len"], variant == DRAFT)
        connection.send(None)
        while (task := connection.recv()) is not None:
            prompts, output_len = task
            connection.send(measure(meter, prompts, output_len, options["num_drafts"]))
        engine.close()
    except Exception as problem:
        traceback.print_exc()
        connection.send(f"{type(problem).__name__}: {problem}")


def _processes(on_gpu: bool) -> Any:
    """How children are started: see the top of this file."""
    if on_gpu:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm_kvcompress.evaluation.engine", "vllm.entrypoints.llm"])
    with patch.dict(os.environ, ON_CPU):
        forkserver.ensure_running()  # else with the first child, and with this environment
    return context


class Child:
    """An engine in a process of its own; returns once the engine runs.

    Parameters
    ----------
    variant : str
        One of `VARIANTS`.
    options : dict
        "model" (folder), "setting" (the plugin's, or None), "engine" (arguments of `Engine`),
        "log" (file the process writes to), "on_gpu", "prompt_len" and "num_drafts" (tokens).

    Raises
    ------
    BenchError
        If the process fails, here or in `measure`; names the log.
    """

    def __init__(self, variant: str, options: dict[str, Any]) -> None:
        context = _processes(options["on_gpu"])
        self.connection, theirs = context.Pipe()
        self.variant, self.log = variant, options["log"]
        self.process = context.Process(target=serve, args=(theirs, variant, options))
        self.process.start()
        theirs.close()
        self._answer()

    def _answer(self) -> Any:
        try:
            found = self.connection.recv()
        except EOFError:
            found = "the process ended"
        if isinstance(found, str):
            self.stop()
            raise BenchError(f"{self.variant}: {found} (log: {Path(self.log).name})")
        return found

    def measure(self, prompts: list[list[int]], output_len: int) -> dict[str, Any]:
        """Run the function `measure` on one batch in the process."""
        self.connection.send((prompts, output_len))
        return self._answer()

    def stop(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

"""Looks into the books of a server's engine when asked, and breaks it on purpose.

A vLLM plugin of a server that is started with `environment`: whoever empties its prefix cache while
the file ``ask`` lies in a folder finds ``books.json`` there, with what `lab.load_checks` has to say
about scheduler, block pool and worker. Faults are for showing that a soak notices them.
"""

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from lab.places import importable, leave_entry_point

FOLDER, FAULT = "KVCOMPRESS_SOAK_FOLDER", "KVCOMPRESS_SOAK_FAULT"
"""Environment variables."""
ASK, BOOKS = "ask", "books.json"

_PATIENT = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600"}
"""Else the server closes connections that were idle for five seconds, on a busy machine just when
the next request is on its way, and the client, which does not retry, counts it as cut off."""

NO_COMPILED_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
"""oneDNN keeps what it has compiled for a matrix product's shape, for 1,024 of them. On a CPU each
new number of tokens in a step is a new shape, for stock vLLM as well: a worker grows until it has
met so many, and a growth of our own could not be told from it."""

FAULTS = {
    "token": "every third compaction keeps the worst tokens in the place of the best",
    "block": "an aborted request leaves a reference to a block",
    "name": "requests stay in a container of the scheduler",
    "memory": "each request costs four MiB for good",
    "orphan": "the engine starts a process that outlives it",
    "shared_memory": "the engine leaves a file in /dev/shm",
    "death": "the engine dies after two hundred requests",
}
"""What can be broken on purpose, by name."""


def environment(folder: Path, faults: Sequence[str] = ()) -> dict[str, str]:
    """Environment of a server that can be looked into.

    Parameters
    ----------
    folder : pathlib.Path
        Of this run; it must exist.
    faults : sequence of str
        Of `FAULTS`.
    """
    leave_entry_point(folder, "kvcompress_soak", "vllm.general_plugins", f"{__name__}:register")
    more = {FOLDER: str(folder), FAULT: ",".join(faults), "VLLM_SERVER_DEV_MODE": "1"}
    more |= NO_COMPILED_SHAPES | _PATIENT
    dropped = {"VLLM_ENABLE_V1_MULTIPROCESSING"}  # keeps engines in the process of tests
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, **importable(folder), **more}


def register() -> None:
    """Entry point: runs in every process of the server, maybe more than once."""
    from vllm.v1.engine.core import EngineCore

    if FOLDER not in os.environ or getattr(EngineCore, "_kvcompress_soak", False):
        return
    EngineCore._kvcompress_soak = True
    EngineCore.reset_prefix_cache = _with_books(EngineCore.reset_prefix_cache)
    for fault in filter(None, os.environ.get(FAULT, "").split(",")):
        _break(EngineCore, fault)


@dataclass(frozen=True)
class Inside:
    """What `lab.load_checks` looks at."""

    scheduler: Any
    pool: Any

    @property
    def num_usable_blocks(self) -> int:
        """Blocks of the pool without the null block."""
        return self.pool.num_gpu_blocks - 1


def _with_books(reset: Callable[..., bool]) -> Callable[..., bool]:
    @wraps(reset)
    def wrapped(core: Any, *args: Any, **kwargs: Any) -> bool:
        done = reset(core, *args, **kwargs)
        folder = Path(os.environ[FOLDER])
        if (folder / ASK).exists():
            part = folder / "books.part"
            part.write_text(json.dumps(_books(core)), encoding="utf-8")
            (folder / ASK).unlink()
            part.replace(folder / BOOKS)
        return done

    return wrapped


def _books(core: Any) -> dict[str, Any]:
    """Of an engine without requests: what is wrong, and how long every container is."""
    from lab.load_checks import LoadError, check_pool, named_in, scheduler_roots, sizes

    if not hasattr(core.scheduler, "_managers"):
        return {"wrong": "", "sizes": {}}  # not ours
    wrong = []
    try:
        core.scheduler.check_integrity()
        check_pool(Inside(core.scheduler, core.scheduler.kv_cache_manager.block_pool))
    except (LoadError, AssertionError) as error:
        wrong.append(f"{type(error).__name__}: {error}")
    roots = scheduler_roots(core.scheduler)
    parts: dict[str, Any] = {"core": {"named": named_in(roots, is_request), "sizes": sizes(roots)}}
    for rank, part in enumerate(core.model_executor.collective_rpc(_worker_books)):
        parts[f"worker {rank}"] = part
    for name, part in parts.items():
        if part["named"]:
            wrong.append(f"{name}: requests that are gone are still named in {part['named'][:8]}")
    lengths = {
        f"{name}: {path}": size for name, part in parts.items()
        for path, size in part["sizes"].items()
    }  # fmt: skip
    return {"wrong": "; ".join(wrong), "sizes": lengths}


def _worker_books(worker: Any) -> dict[str, Any]:
    """A worker's part, in its process."""
    from lab.load_checks import named_in, sizes, worker_roots

    roots = worker_roots(getattr(worker, "worker", worker).model_runner)
    return {"named": named_in(roots, is_request), "sizes": sizes(roots)}


def is_request(text: str) -> bool:
    """Whether this is the id of a request that came over HTTP."""
    return "cmpl-" in text


# --- faults -------------------------------------------------------------------------------

_held: dict[str, list[Any]] = {name: [] for name in FAULTS}
"""What each holds on to."""


def _break(core_class: Any, fault: str) -> None:
    if fault == "token":
        _choose_the_worst()
        return
    if fault == "block":
        _before(core_class, "abort_requests", _keep_a_block)
        return
    deed = {
        "name": _keep_the_name, "memory": _hold, "orphan": _start_a_process,
        "shared_memory": _leave_a_file, "death": _die,
    }[fault]  # fmt: skip
    _before(core_class, "add_request", deed)


def _before(owner: Any, name: str, deed: Any) -> None:
    """Do this before each call."""
    original = getattr(owner, name)

    @wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        deed(self, *args)
        return original(self, *args, **kwargs)

    setattr(owner, name, wrapped)


def _choose_the_worst() -> None:
    from vllm_kvcompress.worker.compaction.compactor import Compactor

    choose = Compactor._choose_and_copy

    def wrapped(self: Any, policy: Any, group: Any, number: int, kind: Any, scores: Any) -> None:
        _held["token"].append(None)
        worst = len(_held["token"]) % 3 == 0
        choose(self, policy, group, number, kind, -scores if worst else scores)

    Compactor._choose_and_copy = wrapped  # type: ignore[method-assign]


def _keep_a_block(core: Any, request_ids: list[str]) -> None:
    managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers
    for request_id in request_ids:
        for block in managers[0].req_to_blocks.get(request_id, ())[:1]:
            block.ref_cnt += 1


def _keep_the_name(core: Any, request: Any, *_: Any) -> None:
    core.scheduler.__dict__.setdefault("_kvcompress_soak_names", []).append(request.request_id)


def _hold(core: Any, *_: Any) -> None:
    _held["memory"].append(os.urandom(4 << 20))


def _start_a_process(core: Any, *_: Any) -> None:
    if not _held["orphan"]:
        _held["orphan"].append(subprocess.Popen(["sleep", "3600"], start_new_session=True))


def _leave_a_file(core: Any, *_: Any) -> None:
    if not _held["shared_memory"]:
        path = Path(f"/dev/shm/kvcompress-soak-{os.getpid()}")
        _held["shared_memory"].append(path.open("w"))


def _die(core: Any, *_: Any) -> None:
    _held["death"].append(None)
    if len(_held["death"]) > 200:
        raise SystemError("a fault of the soak's own")


def books_of(folder: Path) -> Mapping[str, Any] | None:
    """What was written, once; None where nothing was."""
    path = folder / BOOKS
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return found

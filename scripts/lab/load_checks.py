"""What must hold of an engine after every step, and when all its requests are gone."""

import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # whoever imports it keeps engines in this process
    from vllm_kvcompress.evaluation.engine import Engine

MAX_STEP_SECONDS = 60
MAX_STALLED_STEPS = 60
"""Steps in which no request at all gets further."""
MAX_STARVED_STEPS = 2000
"""Steps in which one request gets no further while others do: more than all others together
need if they run one after another."""
MAX_STUCK_STEPS = 150
"""The same for a request that is running: being computed again after preemptions included."""
_OURS = "vllm_kvcompress"


class LoadError(AssertionError):
    """A promise that the engine broke under load."""


class Books(Protocol):
    """An engine's scheduler: of `vllm_kvcompress.evaluation.engine.Engine`, or of a server."""

    @property
    def scheduler(self) -> Any:
        """The scheduler."""

    @property
    def pool(self) -> Any:
        """The block pool."""

    @property
    def num_usable_blocks(self) -> int:
        """Blocks of the pool without the null block."""


@contextmanager
def step_limit(seconds: float = MAX_STEP_SECONDS) -> Iterator[None]:
    """Interrupt a step that takes too long. For the main thread."""

    def give_up(*_: Any) -> None:
        raise LoadError(f"hung: a step takes more than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def check_blocks(engine: Books) -> None:
    """Every block of the pool is free, or has as many holders as references."""
    scheduler, pool = engine.scheduler, engine.pool
    holders = Counter(
        block.block_id
        for manager in scheduler._managers
        for block in manager.held_blocks()
        if not block.is_null
    )
    # Chats that wait for their next turn, and shared prefixes.
    holders.update(block.block_id for block in scheduler.reuse.kept.held_blocks())
    for block in pool.blocks:
        if not block.is_null and block.ref_cnt != holders[block.block_id]:
            raise LoadError(
                f"books: block {block.block_id} has {block.ref_cnt} references and "
                f"{holders[block.block_id]} holders"
            )
    free = pool.get_num_free_blocks()
    if free + len(holders) != engine.num_usable_blocks:
        raise LoadError(
            f"books: {free} blocks are free and {len(holders)} held, of {engine.num_usable_blocks}"
        )
    for manager in scheduler._managers:
        gone = manager.req_to_blocks.keys() - scheduler.requests.keys()
        if any(manager.req_to_blocks[name] for name in gone):
            raise LoadError(f"books: {sorted(gone)} are gone and hold blocks")


class Progress:
    """Finds requests that get no further.

    What counts is how many tokens a request ever had computed or generated: one that is preempted
    and computed again is not further than it was.
    """

    def __init__(self) -> None:
        self._marks: dict[str, int] = {}
        self._since: dict[str, int] = {}
        self._running: Counter[str] = Counter()
        self._step = self._last = 0

    def check(self, requests: dict[str, Any]) -> None:
        """Look at the scheduler's requests, once per step."""
        self._step += 1
        for name in self._marks.keys() - requests.keys():
            self._last = self._step
            del self._marks[name], self._since[name], self._running[name]
        for name, request in requests.items():
            mark = max(request.num_computed_tokens, request.num_tokens)
            if request.num_output_tokens == 0:
                mark = request.num_computed_tokens
            if name not in self._marks or mark > self._marks[name]:
                self._marks[name], self._since[name] = mark, self._step
                self._running[name] = 0
                self._last = self._step
                continue
            self._running[name] += request.status.name == "RUNNING"
            stalled = self._step - self._since[name]
            if stalled > MAX_STARVED_STEPS or self._running[name] > MAX_STUCK_STEPS:
                raise LoadError(
                    f"starved: {name} ({request.status.name}, {request.num_preemptions} "
                    f"preemptions) is at {mark} tokens for {stalled} steps, running in "
                    f"{self._running[name]} of them"
                )
        if requests and self._step - self._last > MAX_STALLED_STEPS:
            raise LoadError(f"stalled: no request gets further in {MAX_STALLED_STEPS} steps")


def check_empty(engine: "Engine", is_name: Callable[[str], bool]) -> None:
    """Nothing of requests is left in scheduler or worker; `is_name` knows their ids."""
    check_pool(engine)
    left = named_in(scheduler_roots(engine.scheduler) | worker_roots(engine.runner), is_name)
    if left:
        raise LoadError(f"left: requests that are gone are still named in {left[:8]}")


def check_pool(engine: Books) -> None:
    """Every block is free, or only in the prefix cache, which is emptied."""
    if not engine.scheduler.reset_prefix_cache():
        raise LoadError("left: the prefix cache cannot be emptied, blocks are still held")
    check_blocks(engine)
    missing = num_missing(engine)
    if missing:
        raise LoadError(f"left: {missing} blocks are missing")


def scheduler_roots(scheduler: Any) -> dict[str, Any]:
    """Where the engine's core names requests, by a name of the place."""
    managers = {f"manager {i}": manager for i, manager in enumerate(scheduler._managers)}
    return {"scheduler": scheduler} | managers


def worker_roots(runner: Any) -> dict[str, Any]:
    """Where a worker does. Its speculator names those of its last step, until the next one."""
    roots = {"model state": runner.model_state, "compactor": runner.compactor}
    return roots | {"rows": runner.req_states.req_id_to_index}


def named_in(roots: Mapping[str, Any], is_name: Callable[[str], bool]) -> list[str]:
    """Places below that name a request."""
    return [
        path
        for name, root in roots.items()
        for path, part in _walk(root, name, set())
        if isinstance(part, str) and is_name(part)
    ]


def sizes(roots: Mapping[str, Any]) -> dict[str, int]:
    """Length of every container below, by its path; what lies in a dictionary as a whole."""
    found: Counter[str] = Counter()
    for name, root in roots.items():
        for path, part in _walk(root, name, set()):
            if isinstance(part, _CONTAINERS):
                found[path.split("[")[0]] += len(part)
    return dict(found)


def num_missing(engine: Books) -> int:
    """Blocks that are not free."""
    return engine.num_usable_blocks - engine.pool.get_num_free_blocks()


_CONTAINERS = (dict, list, tuple, set, frozenset, deque)


def _walk(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """What is in containers and in objects of this package, private attributes included."""
    yield path, value
    if id(value) in seen or isinstance(value, str):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        parts = [(f"{path} (key)", key) for key in list(value)]
        parts += [(f"{path}[{key!r:.20}]", each) for key, each in list(value.items())]
    elif isinstance(value, _CONTAINERS):
        parts = [(path, each) for each in list(value)]
    elif type(value).__module__.startswith(_OURS):
        parts = [
            (f"{path}.{key}", each) for key, each in list(getattr(value, "__dict__", {}).items())
        ]
    else:
        return
    for name, part in parts:
        yield from _walk(part, name, seen)

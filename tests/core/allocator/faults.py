"""Faults that the allocator's model must find: each spoils one line of the code under test.

    python -m tests.core.allocator.faults

shrinks what it finds for each, and says how many rules are left (minutes).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from hypothesis import strategies as st

from tests.core.allocator.worlds import World, worlds
from vllm_kvcompress.core.block_manager import CompressedAttentionManager as Manager
from vllm_kvcompress.core.kept_store import KeptCaches
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.shared_prefixes import SharedPrefixes
from vllm_kvcompress.core.spare_slots import SpareSlots

Spoil = Callable[[Any], Any]


@contextmanager
def _instead(owner: Any, name: str, made: Callable[[Any], Any]) -> Iterator[None]:
    """A method in the place of an owner's, made from that."""
    with patch.object(owner, name, made(getattr(owner, name))):
        yield


def _frees_nothing(owner: Any, name: str) -> Any:
    """A method under which the pool takes no blocks back."""

    def made(own: Any) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            with patch.object(self.block_pool, "free_blocks", lambda blocks: None):
                return own(self, *args, **kwargs)

        return method

    return _instead(owner, name, made)


def _touches_nothing(own: Any) -> Any:
    def method(self: Any, *args: Any) -> Any:
        with patch.object(self.store.pool, "touch", lambda blocks: None):
            return own(self, *args)

    return method


def _hashes_stay(own: Any) -> Any:
    def method(self: Any, *args: Any) -> Any:
        with patch.object(self.block_pool, "evict_blocks", lambda ids: None):
            return own(self, *args)

    return method


def _keeps_pending(own: Any) -> Any:
    def method(self: Any, request_id: str) -> Any:
        self._pending.pop(request_id, None)
        return own(self, request_id)

    return method


def _gives_own_twice(own: Any) -> Any:
    def method(self: Any, request_id: str) -> Any:
        pending = self._pending.get(request_id)
        twice = pending.destination[pending.num_new :] if pending else []
        return [*own(self, request_id), *twice]

    return method


def _evicted_stays(own: Any) -> Any:
    def method(self: Any, request_id: str) -> Any:
        evicted = self.evicted.get(request_id)
        blocks = own(self, request_id)
        if evicted:
            self.evicted[request_id] = evicted
        return blocks

    return method


def _one_slot_short(own: Any) -> Any:
    def method(self: Any, request_id: str, num_tokens: int, num_main: int) -> Any:
        lost = 1 if self.evicted.get(request_id) else 0
        return own(self, request_id, num_tokens - lost, num_main)

    return method


def _shared_too(own: Any) -> Any:
    def method(self: Any, request_id: str, lengths: Any) -> Any:
        region = self.req_to_blocks[request_id][: lengths.region_len // self.block_size]
        return region[::-1]  # the last are taken, and the beginning is what others have as well

    return method


def _restarts_where_it_was(own: Any) -> Any:
    def method(self: Any, request_id: str) -> None:
        pass

    return method


def _remembers_the_dead(own: Any) -> Any:
    def method(self: Any, request_id: str) -> None:
        pass

    return method


def _of(**fixed: Any) -> st.SearchStrategy[World]:
    """Worlds in which a fault can show."""
    simple: dict[str, Any] = {"beside": "", "drafts": "", "is_pipeline": False} | fixed
    return worlds.map(lambda world: World(**{**vars(world), **simple}).allowed())


NO_MARK = patch.object(Manager, "mark_lossy", lambda self, request_id: None)

FAULTS: dict[str, tuple[Callable[[], Any], st.SearchStrategy[World]]] = {
    "a lost free: sources of a compaction": (lambda: _frees_nothing(Manager, "commit"), _of()),
    "a double free: what is overwritten in place": (
        lambda: _instead(Manager, "pop_blocks_for_free", _gives_own_twice), _of(room=1.0, groups=1)
    ),
    "one slot too few after a compaction": (
        lambda: _instead(Manager, "allocate_new_blocks", _one_slot_short), _of()
    ),
    "overwritten blocks stay in the prefix cache": (
        lambda: _instead(Manager, "_take_for_eviction", _hashes_stay), _of(room=1.0)
    ),
    "a compacted request hashes blocks": (lambda: NO_MARK, _of(trigger="all")),
    "evicted slots outlive a preemption": (
        lambda: _instead(Manager, "pop_blocks_for_free", _evicted_stays), _of()
    ),
    "destinations are lost by an abort": (
        lambda: _instead(Manager, "pop_blocks_for_free", _keeps_pending), _of()
    ),
    "a reader of a shared prefix is no holder": (
        lambda: _instead(SharedPrefixes, "hand_over", _touches_nothing),
        _of(trigger="end_of_prompt"),
    ),
    "shared blocks are overwritten": (
        lambda: _instead(Manager, "private_blocks", _shared_too),
        # Whole prompts share the most, and the pool must be full while they do.
        _of(room=1.0, groups=1, trigger="end_of_prompt", always=False),
    ),
    "a reset leaves what is kept": (
        lambda: patch.object(KeptCaches, "clear", lambda self: None), _of()
    ),
    "the planner forgets a preemption": (
        lambda: _instead(Planner, "restart", _restarts_where_it_was), _of()
    ),
    "spare slots outlive a preemption": (
        lambda: _instead(SpareSlots, "forget", _remembers_the_dead), _of()
    ),
}  # fmt: skip


@contextmanager
def spoilt(name: str) -> Iterator[None]:
    """The code under test with one fault."""
    with ExitStack() as stack:
        stack.enter_context(FAULTS[name][0]())
        yield


if __name__ == "__main__":
    from tests.core.allocator.search import shrunk

    for each in FAULTS:
        sys.stdout.write(shrunk(each) + "\n")

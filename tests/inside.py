"""The one place where tests reach what the scheduler's side keeps to itself."""

from typing import Any

from vllm.v1.request import Request

from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.core.room import Room
from vllm_kvcompress.core.spare_slots import SpareSlots


def managers(engine: Any) -> list[CompressedAttentionManager]:
    """Block managers of an engine, one per KV cache group."""
    return engine.scheduler._managers


def preempt(engine: Any, request: Request) -> None:
    """What vLLM does to a running request where the pool is too small for it."""
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, 0.0)


def pending(manager: CompressedAttentionManager, request_id: str) -> Any:
    """Lengths and destination blocks of an eviction that is planned; None if none is."""
    return manager._pending.get(request_id)


def has_declined(room: Room) -> bool:
    """Whether some compaction is remembered as one that would free nothing."""
    return bool(room._declined)


def spare_slots(room: Room) -> SpareSlots:
    """What answers for vLLM's ``allocate_slots``."""
    return room._spare


def never_answer(room: Room) -> None:
    """Let vLLM be asked every time."""
    room._spare.take = lambda *_: None  # type: ignore[method-assign]


def scheduler_of(managers: list[CompressedAttentionManager], **parts: Any) -> Any:
    """A scheduler without an engine, made of nothing but what is given."""
    from vllm_kvcompress.core.scheduler import CompressedScheduler

    found: Any = object.__new__(CompressedScheduler)
    found._managers, found.requests = managers, {}
    vars(found).update(parts)
    return found

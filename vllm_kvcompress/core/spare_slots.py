"""Slots that a running request already has, so that most steps of a decoding request ask nobody.

vLLM's ``KVCacheManager.allocate_slots`` asks every KV cache group, in every step and for every
request, whether it needs blocks and whether blocks have become full. What a group has evicted is a
multiple of its block size, so all groups with blocks of one size need their next block at the same
token: one number per request answers for all of them, whatever the number of groups.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vllm.v1.request import Request

from vllm_kvcompress.core.block_manager import CompressedAttentionManager

_ASKED_OF_RUNNING = frozenset({"num_lookahead_tokens"})
"""What vLLM's scheduler passes for a running request. Any other argument is for its own function:
prefix-cache hits, connectors, admission."""


class _Spare(NamedTuple):
    """Up to which lengths in tokens a request needs nothing."""

    slots: int
    unhashed: float


class SpareSlots:
    """Which steps of running requests need neither a block nor a hash.

    Parameters
    ----------
    managers : sequence of CompressedAttentionManager
        One per KV cache group.
    max_model_len : int
        Tokens of the longest sequence.
    """

    def __init__(self, managers: Sequence[CompressedAttentionManager], max_model_len: int) -> None:
        self._managers = managers
        self._max_model_len = max_model_len
        self._spare: dict[str, _Spare] = {}

    def cover(self, request: Request, num_new_tokens: int, options: Mapping[str, Any]) -> bool:
        """Whether ``allocate_slots`` with these arguments would find nothing to do."""
        spare = self._spare.get(request.request_id)
        if spare is None or num_new_tokens <= 0 or not options.keys() <= _ASKED_OF_RUNNING:
            return False
        num_tokens = request.num_computed_tokens + num_new_tokens
        num_slots = num_tokens + options.get("num_lookahead_tokens", 0)
        return (
            min(num_slots, self._max_model_len) <= spare.slots
            and min(num_tokens, request.num_tokens) < spare.unhashed
        )

    def note(self, request: Request, num_new_tokens: int) -> None:
        """Remember what a running request has, once ``allocate_slots`` has given it blocks."""
        name = request.request_id
        slots, unhashed = self._max_model_len, float("inf")
        num_hashed = min(request.num_computed_tokens + num_new_tokens, request.num_tokens)
        for manager in self._managers:
            size = manager.block_size
            held = len(manager.req_to_blocks[name]) * size + manager.evicted.get(name, 0)
            slots = min(slots, held)
            if manager.enable_caching and name not in manager.lossy:
                unhashed = min(unhashed, (num_hashed // size + 1) * size)
        self._spare[name] = _Spare(slots, unhashed)

    def forget(self, request_id: str) -> None:
        """The request has lost its blocks: it ended or was preempted."""
        self._spare.pop(request_id, None)

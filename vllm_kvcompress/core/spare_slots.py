"""Blocks of running requests that most steps need not ask vLLM for.

vLLM's ``KVCacheManager.allocate_slots`` asks every KV cache group, in every step and for every
request, whether it needs blocks and whether blocks have become full. What a group has evicted is a
multiple of its block size, so all groups with blocks of one size need their next block at the same
token: one number per request answers for all of them, whatever the number of groups. And once a
request hashes nothing any more, a step that does need blocks needs nothing but them: as many in
every group.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.request import Request

from vllm_kvcompress.core.block_manager import CompressedAttentionManager

_ASKED_OF_RUNNING = frozenset({"num_lookahead_tokens"})
"""What vLLM's scheduler passes for a running request. Any other argument is for its own function:
prefix-cache hits, connectors, admission."""


class _Spare(NamedTuple):
    """Up to which lengths in tokens a request needs nothing, and whether all groups agree."""

    slots: int
    unhashed: float
    is_even: bool


class SpareSlots:
    """What running requests hold, and the blocks they need next.

    Parameters
    ----------
    managers : sequence of CompressedAttentionManager
        One per KV cache group.
    pool : BlockPool
        vLLM's, of all of them.
    max_model_len : int
        Tokens of the longest sequence.
    num_set_aside : callable
        Free blocks that are not for growth.
    """

    def __init__(
        self,
        managers: Sequence[CompressedAttentionManager],
        pool: Any,
        max_model_len: int,
        num_set_aside: Callable[[], int],
    ) -> None:
        self._managers, self._pool, self._max_model_len = managers, pool, max_model_len
        self._num_set_aside = num_set_aside
        sizes = {manager.block_size for manager in managers}
        # Blocks that a worker must clear first are noted down by vLLM's own function.
        is_plain = not any(manager.records_new_block_ids for manager in managers)
        self._block_size = sizes.pop() if len(sizes) == 1 and is_plain else None
        self._nothing = KVCacheBlocks(tuple(() for _ in managers))
        self._spare: dict[str, _Spare] = {}

    def take(
        self, request: Request, num_new_tokens: int, options: Mapping[str, Any]
    ) -> KVCacheBlocks | None:
        """What ``allocate_slots`` would give for these arguments; None if it must be asked.

        Blocks that it gives belong to the request. It is asked whenever there are too few.
        """
        spare = self._spare.get(request.request_id)
        if spare is None or num_new_tokens <= 0 or not options.keys() <= _ASKED_OF_RUNNING:
            return None
        num_tokens = request.num_computed_tokens + num_new_tokens
        if min(num_tokens, request.num_tokens) >= spare.unhashed:
            return None
        num_slots = num_tokens + options.get("num_lookahead_tokens", 0)
        num_missing = min(num_slots, self._max_model_len) - spare.slots
        if num_missing <= 0:
            return self._nothing
        return self._grow(request.request_id, spare, num_missing)

    def _grow(self, request_id: str, spare: _Spare, num_tokens: int) -> KVCacheBlocks | None:
        if self._block_size is None or not spare.is_even or spare.unhashed != float("inf"):
            return None
        count = -(-num_tokens // self._block_size)
        num_free = self._pool.get_num_free_blocks() - self._num_set_aside()
        if count * len(self._managers) > num_free:
            return None
        blocks = self._pool.get_new_blocks(count * len(self._managers))
        given = []
        for number, manager in enumerate(self._managers):
            own = blocks[number * count : (number + 1) * count]
            manager.req_to_blocks[request_id].extend(own)
            given.append(own)
        self._spare[request_id] = spare._replace(slots=spare.slots + count * self._block_size)
        return KVCacheBlocks(tuple(given))

    def note(self, request: Request, num_new_tokens: int) -> None:
        """Remember what a running request has, once ``allocate_slots`` has given it blocks."""
        name = request.request_id
        held, unhashed = [], float("inf")
        num_hashed = min(request.num_computed_tokens + num_new_tokens, request.num_tokens)
        for manager in self._managers:
            size = manager.block_size
            held.append(len(manager.req_to_blocks[name]) * size + manager.evicted.get(name, 0))
            if manager.enable_caching and name not in manager.lossy:
                unhashed = min(unhashed, (num_hashed // size + 1) * size)
        self._spare[name] = _Spare(min(held), unhashed, min(held) == max(held))

    def forget(self, request_id: str) -> None:
        """The request has lost its blocks: it ended or was preempted."""
        self._spare.pop(request_id, None)

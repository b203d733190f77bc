"""KV cache groups that vLLM serves as ever, beside those that are compacted.

They are of layers that attend to a window, or that have a recurrent state. Their manager, their
blocks and what they give back are vLLM's own. One thing is asked of them: once a request has lost
tokens anywhere, what layers above compute is not what an uncompressed request computes, so none of
it may be found by another request.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import MappingProxyType
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec
from vllm.v1.request import Request


def blocks_per_state(spec: MambaSpec) -> int:
    """Blocks that one request holds at once for layers with a recurrent state, however long."""
    if spec.mamba_cache_mode != "align":
        return 1 + spec.num_speculative_blocks
    # The state that a step reads and the one that it writes.
    return 2 + spec.num_speculative_blocks + spec.num_prefill_checkpoint_blocks


class HostGroup:
    """One of vLLM's managers, with the questions that are asked of ours.

    Parameters
    ----------
    manager : SingleTypeKVCacheManager
        Of layers that are never compacted.
    num_ahead : int
        Steps that may be under way while another is scheduled.

    Attributes
    ----------
    evicted : Mapping[str, int]
        Empty: nothing of ours is evicted here.
    views : Mapping[str, list]
        Empty, likewise.
    lossy : set[str]
        Requests of which another group has lost tokens.
    """

    evicted: Mapping[str, int] = MappingProxyType({})
    views: Mapping[str, list[KVCacheBlock]] = MappingProxyType({})

    def __init__(self, manager: SingleTypeKVCacheManager, num_ahead: int) -> None:
        self._manager, self._num_ahead = manager, num_ahead
        self.lossy: set[str] = set()
        # On the instance: the registry has one manager per kind of layer, for all engines.
        manager.cache_blocks = self._unless_lossy(manager.cache_blocks)  # type: ignore[method-assign]

    def _unless_lossy(self, cache_blocks: Callable[..., None]) -> Callable[..., None]:
        @wraps(cache_blocks)
        def cache(request: Request, *args: Any, **kwargs: Any) -> None:
            if request.request_id not in self.lossy:
                cache_blocks(request, *args, **kwargs)

        return cache

    @property
    def kv_cache_spec(self) -> KVCacheSpec:
        """What its layers attend to."""
        return self._manager.kv_cache_spec

    @property
    def req_to_blocks(self) -> Mapping[str, list[KVCacheBlock]]:
        """Blocks by request, null blocks in the place of those that were given back."""
        return self._manager.req_to_blocks

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._manager.block_size

    @property
    def most_blocks(self) -> int | None:
        """Blocks that one request holds at once at most; None where vLLM has no such bound.

        Of windowed layers vLLM counts those of steps under way itself. Of states that are kept at
        ends of blocks it does not: each such step still has the one that it reads.
        """
        spec = self.kv_cache_spec
        if isinstance(spec, MambaSpec):
            is_aligned = spec.mamba_cache_mode == "align"
            return blocks_per_state(spec) + (self._num_ahead if is_aligned else 0)
        return self._manager.max_admission_blocks_per_request

    # --- what happens to other groups -----------------------------------------------------

    def commit(self, request_id: str) -> None:
        """Nothing was planned here."""

    def commit_view(self, request_id: str) -> None:
        """Nothing was planned here."""

    def give_up_view(self, request_id: str) -> int:
        """No view has blocks here."""
        return 0

    def mark_lossy(self, request_id: str) -> None:
        """Hash no more blocks of a request."""
        self.lossy.add(request_id)

    def forget(self, request_id: str) -> None:
        """The request is gone, or starts again from nothing."""
        self.lossy.discard(request_id)

    # --- tests ----------------------------------------------------------------------------

    def held_blocks(self) -> Sequence[KVCacheBlock]:
        """Every block that this group's requests hold now."""
        blocks = (block for held in self.req_to_blocks.values() for block in held)
        return [block for block in blocks if not block.is_null]

    def check_integrity(self) -> None:
        """Raise AssertionError if the books contradict each other."""
        for block in self.held_blocks():
            assert block.ref_cnt > 0, f"block {block.block_id} is held and free"
        for request_id in self.lossy:
            assert request_id in self.req_to_blocks, f"{request_id} left its books behind"

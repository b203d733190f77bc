"""Equal prompts: compacted once, by whoever comes first; the others read what it has kept.

Several samples of one prompt, or a question that many ask at once, hold the prompt's blocks
together until its end. What is kept of it there is the same for all of them, for it follows from
the tokens and the setting. So one request makes the copy, in blocks that are never written again,
and each of the others takes these where it would have made a copy of its own. It needs no free
blocks for that, gives its own back, and says what it would say alone.

Nobody loses by it who is not equal in everything: tokens, setting with its pins, cache salt,
adapter. What a request reads besides, from the end of its last whole block on, is its own.

A request whose equal computes the prompt waits for that, and for nothing else. It then finds the
prompt in the prefix cache, and computes its end, for its first token. The others hold no blocks
while the first is compacted, so there is room for that as for a request alone. A copy is there as
long as a request reads it, or has started to: it is no memory for those who may come.

Left out are requests that are compacted while they decode, for then each keeps something else;
those with marks inside their prompts, of which each computes what lies behind the first for itself
anyway; and those that continue a conversation or share a prefix, which are compacted otherwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress.config.mode_checks import compresses_once
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.core.host_groups import HostGroup
from vllm_kvcompress.core.kept_cache import is_served
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.reports import Reports
from vllm_kvcompress.core.tracked_request import Phase, TrackedRequest


class _Key(NamedTuple):
    """What must agree. vLLM's hash of the whole blocks covers salt and adapter, too."""

    whole_blocks: bytes
    rest: tuple[int, ...]
    setting: str


@dataclass
class _Copy:
    """Survivors, by KV cache group, and who reads them or will; None: nothing was evicted."""

    blocks: list[list[KVCacheBlock] | None]
    readers: set[str] = field(default_factory=set)


class EqualPrompts:
    """Who makes a copy, who waits for it, and who reads it.

    Parameters
    ----------
    planner : Planner
        States of all requests.
    managers : sequence of (CompressedAttentionManager or HostGroup)
        One per KV cache group.
    layer_group_of : sequence of (int or None)
        Layer group of every KV cache group; None for one that is never compacted.
    pool : BlockPool
        vLLM's.
    reports : Reports
        Of the workers: what went wrong in a compaction must not reach others.
    note_change : callable
        Called when it changes who needs blocks for a compaction.
    """

    def __init__(
        self,
        planner: Planner,
        managers: Sequence[CompressedAttentionManager | HostGroup],
        layer_group_of: Sequence[int | None],
        pool: Any,
        reports: Reports,
        note_change: Callable[[], None],
    ) -> None:
        self._planner, self._managers, self._layer_group_of = planner, managers, layer_group_of
        self._pool, self._reports, self._note_change = pool, reports, note_change
        self._keys: dict[str, _Key] = {}
        self._requests: dict[_Key, dict[str, Request]] = {}
        self._computing: dict[_Key, str] = {}
        self._copies: dict[_Key, _Copy] = {}
        self._last: tuple[CompressionConfig, str] | None = None

    def add(self, request: Request) -> None:
        """Note a request that arrives, if it may have an equal."""
        name = request.request_id
        key = self._key(request, self._planner.requests[name])
        if key is not None:
            self._keys[name] = key
            self._requests.setdefault(key, {})[name] = request

    def _key(self, request: Request, tracked: TrackedRequest) -> _Key | None:
        config = tracked.config
        if config is None or not compresses_once(config):
            return None
        if tracked.phase is Phase.SKIPPED or tracked.marks != (tracked.prompt_len,):
            return None
        if tracked.shared_len is not None or tracked.session is not None:
            return None
        if not is_served(request) or request.skip_reading_prefix_cache:
            return None
        size = self._pool.hash_block_size
        whole = tracked.prompt_len // size
        if not 0 < whole <= len(request.block_hashes):
            return None  # nothing is hashed without the prefix cache
        assert request.prompt_token_ids is not None
        rest = tuple(request.prompt_token_ids[whole * size :])
        hashed = request.block_hashes[whole - 1]
        return _Key(hashed, rest, self._named(config))

    def _named(self, config: CompressionConfig) -> str:
        """A text that equal settings have alike; most requests run under one object."""
        if self._last is None or self._last[0] is not config:
            self._last = config, config.model_dump_json()
        return self._last[1]

    # --- who makes the copy, and who waits ------------------------------------------------

    def must_wait(self, request: Request) -> bool:
        """Whether an equal computes the prompt of a request that is about to start."""
        name = request.request_id
        key = self._keys.get(name)
        if key is None or key in self._copies:
            return False
        other = self._computing.get(key, name)
        if other != name and self._is_on_its_way(key, other):
            return True
        self._computing[key] = name
        return False

    def _is_on_its_way(self, key: _Key, request_id: str) -> bool:
        request = self._requests[key].get(request_id)
        if request is None or request.status != RequestStatus.RUNNING:
            return False
        tracked = self._planner.requests[request_id]
        # One whose compaction would not pay, because others hold its blocks, may wait for long.
        return tracked.phase is not Phase.DUE or not tracked.is_shared

    def publish(self) -> None:
        """Offer what has been compacted since the last step, to those who run already, too."""
        for key, name in list(self._computing.items()):
            tracked = self._planner.requests[name]
            if tracked.phase is not Phase.DONE or not self._reports.is_complete(name):
                continue
            del self._computing[key]
            if tracked.compaction.compacted_at != tracked.prompt_len:
                continue
            blocks: list[list[KVCacheBlock] | None] = []
            for manager, number in zip(self._managers, self._layer_group_of, strict=True):
                lengths = None if number is None else tracked.compaction.lengths[number]
                row = manager.req_to_blocks[name]
                kept = None if lengths is None else lengths.kept_len // manager.block_size
                blocks.append(None if kept is None else row[:kept])
            self._copies[key] = _Copy(blocks, {name})
            for other, request in self._requests[key].items():
                if request.status == RequestStatus.RUNNING:
                    self._begin(other, key)
            self._note_change()

    # --- who reads it ---------------------------------------------------------------------

    def note_started(self, request: Request) -> None:
        """A request that starts will read the copy of its prompt, if there is one."""
        key = self._keys.get(request.request_id)
        if key is not None and key in self._copies:
            self._begin(request.request_id, key)

    def _begin(self, name: str, key: _Key) -> None:
        copy = self._copies[key]
        tracked = self._planner.requests[name]
        if tracked.phase not in (Phase.ARMED, Phase.DUE):
            return  # whoever made the copy, or one of its own
        copy.readers.add(name)
        for manager, blocks in zip(self._managers, copy.blocks, strict=True):
            if blocks is not None:
                assert isinstance(manager, CompressedAttentionManager)
                self._pool.touch(blocks)
                manager.promised[name] = list(blocks)
        self._note_change()

    def will_read(self, request_id: str) -> bool:
        """Whether a request needs no blocks for its compaction, or will not once it starts."""
        return self._keys.get(request_id) in self._copies

    def reads(self, request_id: str) -> bool:
        """Whether a copy is promised to a request, or it has it."""
        copy = self._copies.get(self._keys[request_id]) if request_id in self._keys else None
        return copy is not None and request_id in copy.readers

    # --- what ends ------------------------------------------------------------------------

    def note_preempted(self, request_id: str) -> None:
        """A request has lost its blocks, and starts again."""
        key = self._keys.get(request_id)
        copy = None if key is None else self._copies.get(key)
        if key is not None and copy is not None:
            copy.readers.discard(request_id)
            if not copy.readers:
                del self._copies[key]
            self._note_change()

    def note_ended(self, request_id: str) -> None:
        """A request has lost its blocks for good."""
        self.note_preempted(request_id)
        key = self._keys.pop(request_id, None)
        if key is None:
            return
        if self._computing.get(key) == request_id:
            del self._computing[key]
        del self._requests[key][request_id]
        if not self._requests[key]:
            del self._requests[key]

    def forget_copies(self) -> None:
        """Whoever comes reads no copy that was made so far: weights may have changed."""
        for name in {name for copy in self._copies.values() for name in copy.readers}:
            for manager in self._managers:
                if isinstance(manager, CompressedAttentionManager):
                    self._pool.free_blocks(reversed(manager.promised.pop(name, [])))
        self._copies.clear()
        self._computing.clear()
        self._note_change()

    # --- tests ----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError if the books contradict each other."""
        assert self._keys.keys() <= self._planner.requests.keys()
        assert sum(map(len, self._requests.values())) == len(self._keys)
        for key, copy in self._copies.items():
            assert copy.readers and copy.readers <= self._requests[key].keys()
            for manager, blocks in zip(self._managers, copy.blocks, strict=True):
                for name in copy.readers if blocks else ():
                    assert isinstance(manager, CompressedAttentionManager)
                    row = manager.promised.get(name) or manager.taken(name)
                    assert row[: len(blocks or ())] == blocks, name
                assert all(block.ref_cnt >= len(copy.readers) for block in blocks or ())

"""Compressed caches that outlive their requests: how many, and which gives way first.

They are memory for speed alone. The longest unused go first where there are too many, and all of
them go before a request waits or is preempted, or a compaction overwrites its own blocks. A block
of theirs that a request holds as well costs nothing: it would not come free.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from vllm_kvcompress.core.kept_cache import Kept, Kind, Place, Reason
from vllm_kvcompress.metrics import CompressionStats


class KeptCaches:
    """All that is kept, the longest unused first.

    Parameters
    ----------
    pool : BlockPool
        vLLM's.
    max_blocks : int
        Blocks that may be held for nobody but those who come.
    stats : CompressionStats
        Where to count.
    note_change : callable
        Called when blocks have lost an owner.
    """

    def __init__(
        self,
        pool: Any,
        max_blocks: int,
        stats: CompressionStats,
        note_change: Callable[[], None],
    ) -> None:
        self.pool, self.max_blocks, self.stats = pool, max_blocks, stats
        self._note_change = note_change
        self._kept: dict[Place, Kept] = {}

    def of(self, kind: Kind) -> Iterator[tuple[Place, Kept]]:
        """What is kept for one purpose, the longest unused first."""
        return ((place, kept) for place, kept in self._kept.items() if place.kind is kind)

    def get(self, place: Place) -> Kept | None:
        """What is kept there."""
        return self._kept.get(place)

    def use(self, place: Place) -> None:
        """Somebody goes on from there."""
        self._kept[place] = self._kept.pop(place)

    def take(self, place: Place) -> Kept:
        """It is kept no longer, and its blocks are the caller's."""
        return self._kept.pop(place)

    def put(self, place: Place, kept: Kept) -> None:
        """Keep a cache, whose blocks have a holder for this; if it is too large it goes at once."""
        self.give_back(place, Reason.REPLACED)
        self._kept[place] = kept
        if _num_idle(kept) > self.max_blocks:
            self.give_back(place, Reason.TOO_LARGE)
        self.trim()

    def put_back(self, place: Place, kept: Kept) -> None:
        """What was taken is kept as before."""
        self._kept[place] = kept

    def trim(self) -> None:
        """Give back what is too much, once blocks have lost a holder."""
        num_kept = sum(kept.num_blocks for kept in self._kept.values())
        while num_kept > self.max_blocks and self.num_idle > self.max_blocks:
            self._give_back_oldest(Reason.LIMIT)

    # --- what gives way -------------------------------------------------------------------

    @property
    def is_all(self) -> bool:
        """Whether nothing but what is kept holds blocks."""
        num_used = self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()
        return num_used == len({block.block_id for block in self.held_blocks()})

    @property
    def num_idle(self) -> int:
        """Blocks that come free if everything is given back."""
        return sum(map(_num_idle, self._kept.values()))

    def give_way(self) -> bool:
        """Give back what was used longest ago and frees blocks; False if there is nothing."""
        return self._give_back_oldest(Reason.ROOM)

    def give_back_sharers(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Give back whatever holds one of these, for whose owner they do not come free."""
        wanted = {block.block_id for block in blocks if block.ref_cnt > 1}
        for place, kept in list(self._kept.items()):
            if any(block.block_id in wanted for group in kept.blocks for block in group):
                self.give_back(place, Reason.ROOM)

    def clear(self) -> None:
        """Give everything back: the prefix cache is emptied."""
        for place in list(self._kept):
            self.give_back(place, Reason.RESET)

    def _give_back_oldest(self, reason: str) -> bool:
        for place, kept in self._kept.items():
            if _num_idle(kept):
                self.give_back(place, reason)
                return True
        return False

    def give_back(self, place: Place, reason: str) -> None:
        """Free what is kept there, if anything is."""
        kept = self._kept.pop(place, None)
        if kept is not None:
            self.free(kept.blocks)
            self.stats.record_given_back(place.kind.value, reason)

    def free(self, groups: Sequence[Sequence[KVCacheBlock]]) -> None:
        """Blocks of a cache, by KV cache group, lose the holder that they have for it."""
        for blocks in groups:
            self.pool.free_blocks(reversed(blocks))
        self._note_change()

    def held_blocks(self) -> list[KVCacheBlock]:
        """Every block that is kept."""
        return [block for kept in self._kept.values() for group in kept.blocks for block in group]

    # --- tests ----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError if the books contradict each other."""
        assert self.num_idle <= self.max_blocks
        for block in self.held_blocks():
            assert block.ref_cnt > 0, f"block {block.block_id} is kept and free"
        for place, kept in self._kept.items():
            num_tokens = len(kept.token_ids)
            assert 0 < kept.held.compacted_at <= num_tokens, place


def _num_idle(kept: Kept) -> int:
    """Blocks that nobody else holds."""
    return sum(block.ref_cnt == 1 for group in kept.blocks for block in group)

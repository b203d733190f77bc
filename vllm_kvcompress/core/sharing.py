"""Requests that hold blocks in common."""

from collections.abc import Mapping, Sequence

from vllm.v1.core.kv_cache_utils import KVCacheBlock


def families(shared: Mapping[str, Sequence[KVCacheBlock]]) -> list[set[str]]:
    """Requests that hold a block in common, directly or through others; none that share nothing."""
    found: list[tuple[set[str], set[int]]] = []
    for name, blocks in shared.items():
        ids = {block.block_id for block in blocks}
        if not ids:
            continue
        names = {name}
        apart = []
        for other_names, other_ids in found:
            if ids & other_ids:
                names |= other_names
                ids |= other_ids
            else:
                apart.append((other_names, other_ids))
        found = [*apart, (names, ids)]
    return [names for names, _ in found]

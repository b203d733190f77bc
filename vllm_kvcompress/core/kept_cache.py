"""A compressed cache that outlives its request, and what must agree for another to go on there."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core.tracked_request import CompactionSchedule


class Kind(Enum):
    """What a cache is kept for."""

    SESSION = "session"
    SHARED_PREFIX = "shared_prefix"


class Place(NamedTuple):
    """Where a cache is kept.

    Attributes
    ----------
    name : str
        Of a conversation; or what a shared prefix says, and its setting, as a hash.
    salt : str or None
        Cache salt: one salt's names are no business of another's.
    adapter : tuple of (str, int) or None
        An adapter has keys of its own.
    kind : Kind
        What it is kept for.
    """

    name: str
    salt: str | None
    adapter: tuple[str, int] | None
    kind: Kind


class Outcome:
    """What became of a request that names a conversation; values of the metric's label."""

    REUSED = "reused"
    NOTHING_KEPT = "nothing_kept"
    OTHER_SETTING = "other_setting"
    OTHER_TOKENS = "other_tokens"
    SHARED_BLOCK = "shared_block"
    PREFIX_CACHE = "prefix_cache"
    UNCOMPRESSED = "uncompressed"
    UNSERVED = "unserved"


class Reason:
    """Why a cache is kept no longer, or not at all; values of the metric's label."""

    REPLACED = "replaced"
    LIMIT = "limit"
    ROOM = "room"
    RESET = "reset"
    NO_FIT = "no_fit"
    TOO_LARGE = "too_large"


@dataclass(frozen=True)
class Kept:
    """One cache.

    Attributes
    ----------
    token_ids : array of int32
        Tokens whose keys are in the cache, for certain. Of a long text that keeps few blocks they
        are most of what is kept, and a list takes nine times as much.
    blocks : list[list[KVCacheBlock]]
        By KV cache group.
    held : CompactionSchedule
        What its layer groups hold.
    prompt_len : int
        Tokens of the prompt that it was compressed as.
    config : CompressionConfig
        Its setting.
    """

    token_ids: "array[int]"
    blocks: list[list[KVCacheBlock]]
    held: CompactionSchedule
    prompt_len: int
    config: CompressionConfig

    @property
    def num_blocks(self) -> int:
        """Of all groups."""
        return sum(map(len, self.blocks))


def place_of(request: Request, name: str, kind: Kind) -> Place:
    """Where a request's cache is kept under a name."""
    adapter = request.lora_request
    own = None if adapter is None else (adapter.lora_name, adapter.lora_int_id)
    return Place(name, request.cache_salt, own, kind)


def is_served(request: Request) -> bool:
    """Whether its prompt is token ids and nothing else: no images, no embeddings."""
    return request.prompt_token_ids is not None and not request.mm_features


def is_private(block: KVCacheBlock) -> bool:
    """Whether nobody else reads a block, nor can find it in the prefix cache."""
    return block.ref_cnt == 1 and block.block_hash is None


def tokens_of(token_ids: Iterable[int]) -> "array[int]":
    """Token ids as they are kept."""
    return array("i", token_ids)


def num_common(kept: "array[int]", prompt: list[int]) -> int:
    """Tokens that two texts begin with alike."""
    if tokens_of(prompt[: len(kept)]) == kept:
        return len(kept)
    pairs = enumerate(zip(kept, prompt, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(kept), len(prompt)))

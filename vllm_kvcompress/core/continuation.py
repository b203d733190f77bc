"""How a kept cache reaches vLLM's scheduler: as a prefix-cache hit without blocks."""

from typing import Protocol

from vllm.v1.core.kv_cache_manager import KVCacheBlocks

from vllm_kvcompress.core.kept_cache import Kept, Place
from vllm_kvcompress.core.tracked_request import TrackedRequest


class Giver(Protocol):
    """Whose caches they are."""

    def hand_over(
        self, request_id: str, place: Place, kept: Kept, num_tokens: int
    ) -> TrackedRequest:
        """The blocks of `num_tokens` tokens are the request's; its state before that."""
        ...

    def confirm(self, kept: Kept, num_tokens: int) -> None:
        """They stay."""
        ...

    def take_back(self, before: TrackedRequest, request_id: str, place: Place, kept: Kept) -> None:
        """There was no room for the request: everything is as before `hand_over`."""
        ...


class Continuation(KVCacheBlocks):
    """A prefix-cache hit, for vLLM's scheduler, whose blocks are those of a kept cache.

    To vLLM it has no blocks: they become the request's while it asks for more (`begin`), and stay
    its own if it gets them (`end`).

    Attributes
    ----------
    num_tokens : int
        Tokens that are in them.
    """

    def __init__(
        self, giver: Giver, request_id: str, place: Place, kept: Kept, num_tokens: int
    ) -> None:
        super().__init__(tuple(() for _ in kept.blocks))
        self.num_tokens = num_tokens
        self._giver, self._request_id, self._place, self._kept = giver, request_id, place, kept
        self._before: TrackedRequest | None = None

    def begin(self) -> None:
        """The blocks are the request's."""
        self._before = self._giver.hand_over(
            self._request_id, self._place, self._kept, self.num_tokens
        )

    def end(self, admitted: bool) -> None:
        """They stay, or wait again."""
        assert self._before is not None
        if admitted:
            self._giver.confirm(self._kept, self.num_tokens)
        else:
            self._giver.take_back(self._before, self._request_id, self._place, self._kept)

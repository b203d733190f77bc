"""Sequences that the pool cannot hold: how long a request may become.

vLLM starts only where its longest sequence fits, and counts on that: a request that nobody can help
would wait for ever. With compression inside prompts the longest prompt fits under the server's
setting. What a request asks for beyond that, a longer output or less compression, ends here.
"""

from vllm.logger import init_logger
from vllm.v1.request import Request

from vllm_kvcompress.core.room import Room
from vllm_kvcompress.errors import one_line

logger = init_logger(f"vllm.{__name__}")

_NOBODY = ""


class LongestSequence:
    """How many tokens of a request fit into the pool, where it has it alone.

    Parameters
    ----------
    room : Room
        The pool and its managers.
    num_usable : int
        Blocks that are ever handed out.
    max_model_len, num_lookahead : int
        Tokens of the longest sequence, and slots behind it that drafts take.
    """

    def __init__(self, room: Room, num_usable: int, max_model_len: int, num_lookahead: int) -> None:
        self.room, self.num_usable = room, num_usable
        self.max_model_len, self.num_lookahead = max_model_len, num_lookahead
        self._holds_all = self._fits(_NOBODY, max_model_len)

    def _fits(self, request_id: str, num_tokens: int) -> bool:
        num_slots = min(num_tokens + self.num_lookahead, self.max_model_len)
        return self.room.num_growth(request_id, num_slots) <= self.num_usable

    def bound(self, request: Request) -> bool:
        """End a request that is new where the pool does; False if not even its prompt fits.

        It ends as it would at the longest sequence of the model, for its length.
        """
        if self._holds_all:
            return True
        name, prompt_len = request.request_id, request.num_prompt_tokens
        end = min(prompt_len + request.max_tokens, self.max_model_len)
        if self._fits(name, end):
            return True
        longest = self._longest(name, end)
        if longest <= prompt_len:
            return False
        logger.info(
            "KV compression: request %s ends after %d output tokens instead of %d: the pool of %d "
            "blocks holds no more of it under its setting.",
            one_line(name), longest - prompt_len, request.max_tokens, self.num_usable,
        )  # fmt: skip
        request.max_tokens = longest - prompt_len
        return True

    def _longest(self, name: str, end: int) -> int:
        """The longest sequence below `end` that fits, at least 0."""
        low, high = 0, end
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(name, middle) else (low, middle)
        return low

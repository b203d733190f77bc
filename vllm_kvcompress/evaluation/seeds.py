"""Seeds of policies that draw random numbers, as the engine gives them."""

import zlib
from array import array
from collections.abc import Sequence


def prompt_seed(token_ids: Sequence[int]) -> int:
    """The seed that the scheduler gives a prompt."""
    return zlib.crc32(array("q", token_ids).tobytes())

"""How many tokens' codes one slot row takes: arithmetic alone, for scheduler and kernels alike."""

MAX_ENTRIES = 2**16
"""Entries that a number of 16 bits can name."""

CODE_WIDTH = 6
"""int16 per token: K entry, V entry, K length, V length, position's low and high 16 bits."""


def codes_per_row(width: int) -> int:
    """T: tokens whose codes one slot row of `width` int16 takes, a power of two with 6 T <= W.

    A slot row is what one token's key and value take in one head: ``head_dim`` times the bytes of a
    cached number int16.

    Raises
    ------
    ValueError
        If not even one token fits.
    """
    if width < CODE_WIDTH:
        raise ValueError(f"a row of {width} int16 is too short for the {CODE_WIDTH} of one token")
    return 1 << ((width // CODE_WIDTH).bit_length() - 1)

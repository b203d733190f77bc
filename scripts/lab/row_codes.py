"""What the marks in rows of a cache say, and how: see row_marks.py.

Marks are digits from 0 to 15, which every type of cache holds exactly, in some channels of a value.
"""

import torch

DIGITS = {"number": 4, "position": 4, "layer": 2, "head": 2, "lossy": 1}
"""Channels of a value by what they say."""
NUM_CHANNELS = sum(DIGITS.values())
DRAFTED = 0
"""Number of tokens that are drafted: what is verified later overwrites them."""
LIMIT = 1 << 16


def encode(layer: int, number: torch.Tensor, position: torch.Tensor, lossy: torch.Tensor,
           num_heads: int) -> torch.Tensor:  # fmt: skip
    """Marks [T, KV, NUM_CHANNELS] of tokens whose numbers, positions and flags are [T] int64."""
    heads = torch.arange(num_heads, device=number.device).expand(len(number), num_heads)
    wide = {
        "number": number[:, None].expand_as(heads),
        "position": position[:, None].expand_as(heads),
        "layer": torch.full_like(heads, layer),
        "head": heads,
        "lossy": lossy[:, None].expand_as(heads),
    }
    digits = [
        wide[name] >> 4 * place & 15 for name, count in DIGITS.items() for place in range(count)
    ]
    return torch.stack(digits, dim=-1)


def decode(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the marks of values [KV, n, D] say, [KV, n] int64 each."""
    digits, found, first = values[..., :NUM_CHANNELS].round().long(), {}, 0
    for name, count in DIGITS.items():
        places = torch.arange(count, device=values.device) * 4
        found[name] = (digits[..., first : first + count] << places).sum(dim=-1)
        first += count
    return found


def codes_of(marks: dict[str, torch.Tensor]) -> torch.Tensor:
    """[KV, n] int64: who computed a row, where, and over what."""
    return (marks["number"] * LIMIT + marks["position"]) * 2 + marks["lossy"]


def say(code: int) -> str:
    """A code for people."""
    if code == DRAFTED:
        return "a draft"
    number, position = divmod(code // 2, LIMIT)
    return f"token {position} of start {number}{', computed over a part' if code % 2 else ''}"

"""What the marks in rows of a cache say, and how: see row_marks.py.

Marks are digits from 0 to 15, which every type of cache holds exactly, in some channels of a value.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lab.load_checks import LoadError

DIGITS = {"number": 4, "position": 4, "layer": 2, "head": 2, "lossy": 1}
"""Channels of a value by what they say."""
NUM_CHANNELS = sum(DIGITS.values())
DRAFTED = 0
"""Number of tokens that are drafted: what is verified later overwrites them."""
LIMIT = 1 << 16


@dataclass
class Start:
    """One start of a request: a preempted one starts again.

    Attributes
    ----------
    request : Request
        vLLM's, which knows its tokens when it is gone, too.
    num_begun : int
        Tokens that it has found computed.
    lost : dict[int, int]
        Slots given up, by layer.
    rows : dict[int, torch.Tensor]
        By layer, the codes [KV, n] of the rows it should read.
    views : dict[int, tuple[torch.Tensor, int]]
        By layer, codes [KV, k] of what its view keeps, and the first of `rows` behind them.
    num_certain : int
        Tokens of it that the step under way computes, or has found, and that need no verdict.
    begins : int or None
        Where its next step begins.
    """

    number: int
    request: Any
    num_begun: int
    lost: dict[int, int]
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    views: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)
    is_lossy: bool = False
    num_certain: int = 0
    begins: int | None = None

    @property
    def name(self) -> str:
        return self.request.request_id


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


def compare(place: str, layer: int, marks: dict[str, torch.Tensor], wanted: torch.Tensor) -> None:
    """Rows of a layer, by their marks [KV, n], must have the codes [KV, n] that are wanted.

    Raises
    ------
    LoadError
        With the place and the first row that is another one, or another layer's or head's.
    """
    codes, heads = codes_of(marks), torch.arange(len(wanted), device=wanted.device)[:, None]
    is_right = (marks["layer"] == layer) & (marks["head"] == heads) & (codes == wanted)
    if is_right.all():
        return
    head, row = (~is_right).nonzero()[0].tolist()
    found, right = (say(int(table[head, row])) for table in (codes, wanted))
    whose = f"layer {int(marks['layer'][head, row])}, head {int(marks['head'][head, row])}"
    found += f" ({whose})" if found == right else ""
    raise LoadError(f"{place}, head {head}, row {row}: {found} not {right}")


def wrap(owner: Any, name: str, instead: Callable[..., Any], *first: Any) -> None:
    """Have `instead` called in the place of a method, with that method and `first` before all."""
    own = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: instead(own, *first, *args, **kwargs))

"""What marks say of rows, without an engine; tests/e2e/test_row_marks.py has one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lab.load_checks import LoadError
from lab.row_codes import Start, codes_of, compare, decode, encode
from lab.row_marks import RowMarks


def start(number: int, tokens: list[int]) -> Start:
    request = SimpleNamespace(request_id=f"r{number}", all_token_ids=tokens, cache_salt=None)
    return Start(number, request, 0, {})


def owners(own: list[int], numbers: list[int], positions: list[int]) -> None:
    """Look at rows of the starts 1 (of the tokens 1, 2, 3) and 2 (of 1, 2, 4, 5), taken by one."""
    marks: Any = RowMarks.__new__(RowMarks)
    marks.known = {1: start(1, [1, 2, 3]), 2: start(2, [1, 2, 4, 5])}
    marks._check_owners("rows", start(3, own), torch.tensor([numbers]), torch.tensor([positions]))


def test_rows_of_several_starts_are_of_their_owners_tokens() -> None:
    """The first request had one prefix in common with a second, which has all with the third."""
    owners([1, 2, 4, 5], [1, 1, 2, 2], [0, 1, 2, 3])
    with pytest.raises(LoadError, match="begins with rows of r1, of other tokens"):
        owners([1, 2, 4, 5], [1, 1, 1, 2], [0, 1, 2, 3])
    with pytest.raises(LoadError, match="begins with rows of nobody"):
        owners([1, 2], [7, 7], [0, 1])


def test_rows_are_compared_one_by_one() -> None:
    number, position = torch.tensor([5, 5, 5]), torch.tensor([0, 1, 2])
    values = torch.zeros(2, 3, 16)
    values[..., :13] = encode(4, number, position, torch.zeros(3).long(), 2).transpose(0, 1)
    marks = decode(values)
    wanted = codes_of(marks)
    compare("here", 4, marks, wanted)
    with pytest.raises(LoadError, match=r"here, head 0, row 0: token 0 of start 5 \(layer 4, head"):
        compare("here", 3, marks, wanted)
    with pytest.raises(LoadError, match="here, head 1, row 2: token 2 of start 5 not a draft"):
        compare("here", 4, marks, wanted * torch.tensor([[1, 1, 1], [1, 1, 0]]))

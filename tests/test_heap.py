"""Tests that drive Python to its recursion limit: see `tests.heap`."""

import ast
import gc
import json
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


class Left:
    """What another test left behind: garbage, in a cycle, whose end needs a frame or two."""

    ended: list[str] = []

    def __init__(self) -> None:
        self.self = self

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        self.ended.append("")


@pytest.mark.deep
def test_garbage_waits_until_python_is_back_from_its_limit() -> None:
    Left.ended.clear()
    for _ in range(3):
        Left()
    with pytest.raises(RecursionError):
        json.loads("[" * 100_000)
    assert Left.ended == []
    gc.collect()
    assert len(Left.ended) == 3


def test_garbage_is_collected_in_other_tests() -> None:
    assert gc.isenabled()


def test_who_nests_texts_this_deep_says_so() -> None:
    """Brackets times a large number, anywhere in the tests: the file knows of the mark."""
    deep = [path for path in TESTS.rglob("*.py") if _nests(path)]
    assert len(deep) > 4
    for path in deep:
        assert "pytest.mark.deep" in path.read_text(encoding="utf-8"), path


def _nests(path: Path) -> bool:
    return any(map(_is_deep, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))


def _is_deep(node: ast.AST) -> bool:
    match node:
        case ast.BinOp(ast.Constant(str() | bytes() as what), ast.Mult(), ast.Constant(times)):
            text = what if isinstance(what, str) else what.decode("latin-1")
            return text.startswith(("[", "{")) and times >= 10_000
    return False

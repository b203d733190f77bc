"""Mutants are judged by the likeliest tests first, and counted by module."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lab.mutants import KILLED, SURVIVED, UNCHANGED, UNREACHED, Judge, Order, score

CLIP = "vllm_kvcompress.core.room.xǁRoomǁclip"
GROW = "vllm_kvcompress.core.room.xǁRoomǁgrow"


def test_tests_that_killed_neighbours_come_first() -> None:
    seconds = {"short": 0.01, "long": 1.0, "other": 0.01}
    order = Order({CLIP: ["long", "short"], GROW: ["long", "short", "gone"]}, seconds)
    collected = ["short", "long", "other"]
    assert order.tests(f"{CLIP}__mutmut_1", collected) == ["short", "long"]
    for number in range(40):
        order.killed(f"{CLIP}__mutmut_{number}", "long")
    assert order.tests(f"{CLIP}__mutmut_50", collected) == ["long", "short"]
    assert order.tests(f"{GROW}__mutmut_1", collected) == ["long", "short"], "of its module"


def test_tests_of_the_modules_own_file_come_first() -> None:
    own, other = "tests/core/test_room.py::test_it", "tests/core/test_all.py::test_room"
    order = Order({CLIP: [other, own]}, {own: 0.5, other: 0.1}, limit=0.5)
    assert order.tests(f"{CLIP}__mutmut_1", [other, own]) == [own]


def test_new_tests_judge_every_mutant() -> None:
    order = Order({CLIP: ["old"]}, {"old": 0.5})
    assert set(order.tests(f"{CLIP}__mutmut_1", ["old", "new"])) == {"old", "new"}
    assert order.tests(f"{GROW}__mutmut_1", ["old", "new"]) == ["new"]


def test_a_mutant_that_lives_costs_so_many_seconds() -> None:
    seconds = {"short": 0.5, "long": 9.0, "other": 0.6}
    reached_by = {CLIP: list(seconds), GROW: ["long"]}
    tests = Order(reached_by, seconds, limit=1.2).tests
    assert tests(f"{CLIP}__mutmut_1", list(seconds)) == ["short", "other"]
    assert tests(f"{GROW}__mutmut_1", list(seconds)) == ["long"], "one is asked in any case"


class Forks(Judge):
    """Instead of forks: which tests fail on which mutant."""

    fails = {("m1", "good"), *[(name, "broken") for name in ("m1", "m2", UNCHANGED)]}

    def judge(self, name: str, items: Sequence[Any]) -> tuple[str, str]:
        killers = [item.nodeid for item in items if (name, item.nodeid) in self.fails]
        if not items:
            return UNREACHED, ""
        return (KILLED, killers[0]) if killers else (SURVIVED, "")


def test_a_test_that_fails_without_a_mutant_kills_none(capsys: pytest.CaptureFixture[str]) -> None:
    """One that measured its own seconds failed in every fork, and 232 mutants were called dead."""
    judge = Forks([], Order({}, {}), Path("nowhere"), {})
    broken, good = SimpleNamespace(nodeid="broken"), SimpleNamespace(nodeid="good")
    assert judge.verdict("m1", [broken, good]) == (KILLED, "good")
    assert judge.verdict("m2", [broken, good]) == (SURVIVED, "")
    assert judge.verdict("m2", [broken]) == (UNREACHED, "")
    assert capsys.readouterr().err == "fails without a mutant: broken\n", "once"


def test_the_score_is_by_module() -> None:
    verdicts = {
        f"{CLIP}__mutmut_1": ["killed", "a test"],
        f"{CLIP}__mutmut_10": ["survived", ""],
        "vllm_kvcompress.plans.x_of__mutmut_1": ["timeout", ""],
    }
    assert score(verdicts) == [
        ("vllm_kvcompress.core.room", Counter(killed=1, survived=1)),
        ("vllm_kvcompress.plans", Counter(timeout=1)),
        ("all", Counter(killed=1, survived=1, timeout=1)),
    ]

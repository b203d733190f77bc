"""What came of a soak."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lab.soak import checks
from lab.soak.checks import Reference
from lab.soak.client import Answer
from lab.soak.questions import LOSSLESS, Question, Request


@dataclass
class Report:
    """What came of a soak; see docs/trust.md."""

    about: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    asked: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    questions: dict[str, int] = field(default_factory=dict)
    distinct_answers: int = 0
    lossless_compared: int = 0
    equal_to_stock: int = 0
    lossy_compared: int = 0
    changed_by_compression: int = 0
    fates: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    answers_compared: int = 0
    tokens_compared: int = 0
    second_turns: dict[str, int] = field(default_factory=dict)
    counted: dict[str, float] = field(default_factory=dict)
    policies: dict[str, float] = field(default_factory=dict)
    resets: int = 0
    memory: list[dict[str, Any]] = field(default_factory=list)
    kept_left: dict[str, float] = field(default_factory=dict)
    containers: dict[str, int] = field(default_factory=dict)
    ending: dict[str, Any] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def fail(self, what: str, detail: str, **more: Any) -> None:
        """Note what went wrong."""
        self.failures.append({"what": what, "detail": detail, **more})


def hold_against_stock(
    report: Report,
    questions: Sequence[Question],
    references: Mapping[str, Reference],
    stock: Mapping[str, list[list[int]]],
    is_lossless: bool = False,
) -> None:
    """Lossless answers are those of stock vLLM; how many of the others are not is counted.

    Parameters
    ----------
    report : Report
        Is filled.
    questions, references
        Of a soak.
    stock : mapping
        Tokens by choice, by the names of questions.
    is_lossless : bool
        Whether that must hold of the others as well.
    """
    for question in questions:
        if question.name not in stock:
            continue
        found, wanted = references[question.name].tokens, Reference(stock[question.name])
        equal = found == wanted.tokens
        if not is_lossless and question.kind not in LOSSLESS:
            report.changed_by_compression += not equal
            report.lossy_compared += 1
            continue
        report.equal_to_stock += equal
        report.lossless_compared += 1
        if not equal:
            answer = Answer(tokens=found, reasons=["length"] * len(found))
            request = Request(0, question.name, max_tokens=question.max_tokens)
            detail = checks.wrong_answer(request, wanted, answer)
            report.fail("not stock's", detail, question=question.name, body=question.body("MODEL"))

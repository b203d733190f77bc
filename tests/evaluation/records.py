"""Records of a run that never was, for tests of what is made of them."""

from typing import Any

from vllm_kvcompress.evaluation.quality.cells import (
    Cell,
)
from vllm_kvcompress.evaluation.quality.records import BASELINE, Record

ABOUT = {"command": "kvcompress eval --tasks niah", "vllm": "0.32.0"}


def record(policy: str = BASELINE, budget: float = 1.0, score: float = 1.0, **more: Any) -> Record:
    given: dict[str, Any] = {
        "task": "niah_single",
        "sample": "a",
        "length": 4096,
        "depth": 0.5,
        "protocol": "visible",
        "kept": budget,
        "prompt_tokens": 4096,
        "answer": "4827193",
        "answer_tokens": 8,
        "seconds": 1.0,
    }
    return Record(policy=policy, budget=budget, score=score, **{**given, **more})


def only(cells: list[Cell], **where: Any) -> Cell:
    (cell,) = [c for c in cells if all(getattr(c, name) == value for name, value in where.items())]
    return cell


def small_run() -> list[Record]:
    """Four samples under the whole cache, three of them under half of it."""
    found = []
    for name, before, after, length in (
        ("a", 1.0, 1.0, 10),
        ("b", 1.0, 0.0, 40),
        ("c", 0.0, 1.0, 10),
        ("d", 1.0, None, 0),
    ):
        found.append(record(sample=name, score=before, answer=f"whole {name}"))
        if after is not None:
            more = {"sample": name, "answer": f"half {name}", "answer_tokens": length}
            found.append(record("snapkv", 0.5, after, kept=0.52, **more))
    return found

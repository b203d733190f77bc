"""docs/compatibility.md says what the checks say, and names tests that are there."""

import ast
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from vllm.model_executor.models.registry import _LazyRegisteredModel

from lab.compatibility.command import pages
from lab.compatibility.families import FAMILIES
from lab.compatibility.features import FEATURES
from lab.compatibility.rows import UNTRIED, Row, verdict
from lab.model_classes import (
    ACCEPTED,
    COLUMNS,
    REFUSED,
    TABLE,
    UNKNOWN,
    accepted_config,
    architectures,
    inspect_here,
    judged,
)

ROOT = Path(__file__).parents[2]
ROWS = (*FAMILIES, *FEATURES)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with patch.object(_LazyRegisteredModel, "inspect_model_cls", inspect_here):
        yield accepted_config(str(tmp_path_factory.mktemp("accepted")))


def test_the_pages_are_as_the_command_writes_them() -> None:
    for path, text in pages().items():
        assert path.read_text(encoding="utf-8") == text, "run python scripts/compatibility.py"


def test_names_are_said_once() -> None:
    """But for rows that go on from the one before them."""
    names = [row.name for row in ROWS if not row.name.startswith("the same")]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("row", [row for row in ROWS if row.stand_in], ids=lambda row: row.name)
def test_the_checks_say_what_the_row_says(row: Row, base: Any, tmp_path: Path) -> None:
    assert row.stand_in is not None
    said = verdict(row.stand_in, base, tmp_path)
    assert said == (None if row.tests else row.says)


def names_in(path: Path) -> set[str]:
    """Names that pytest collects from a file."""
    assert path.name.startswith("test_") and path.suffix == ".py"
    body = ast.parse(path.read_text(encoding="utf-8")).body
    found = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    for owner in body:
        if isinstance(owner, ast.ClassDef) and owner.name.startswith("Test"):
            own = [node for node in owner.body if isinstance(node, ast.FunctionDef)]
            found |= {f"{owner.name}::{node.name}" for node in own}
    return found


@pytest.mark.parametrize("test", sorted({test for row in ROWS for test in row.tests} - {UNTRIED}))
def test_every_test_is_there(test: str) -> None:
    file, _, name = test.partition("::")
    assert name.rpartition("::")[2].startswith("test_") and name in names_in(ROOT / file)


def test_a_row_has_tests_or_a_stand_in() -> None:
    for row in ROWS:
        assert row.tests or row.stand_in, row.name


# --- vLLM's model classes -----------------------------------------------------------------


def table() -> dict[str, dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {row["architecture"]: row for row in csv.DictReader(file)}


def test_every_class_of_the_registry_has_a_row() -> None:
    rows = table()
    assert [(name, row["kind"]) for name, row in rows.items()] == list(architectures())
    for row in rows.values():
        assert tuple(row) == COLUMNS
        for column in ("before", "after"):
            assert row[column] in (ACCEPTED, REFUSED, UNKNOWN)
            assert bool(row[f"why_{column}"]) is (row[column] != ACCEPTED)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("LlamaForCausalLM", "text"),
        ("GptOssForCausalLM", "text"),
        ("Gemma2ForCausalLM", "text"),
        ("MistralForCausalLM", "text"),
        ("Mamba2ForCausalLM", "text"),
        ("DeepseekV3ForCausalLM", "text"),
        ("SmolLM3ForCausalLM", "transformers"),
        ("Idefics3ForConditionalGeneration", "multimodal"),
    ],
)
def test_a_class_is_judged_as_the_table_says(architecture: str, kind: str, base: Any) -> None:
    """A few of each kind: the table is written anew when checks change."""
    row = table()[architecture]
    name, verdict, reason = judged(architecture, kind, base)
    assert (verdict, reason) == (row["after"], row["why_after"])
    assert name == row["configuration"]

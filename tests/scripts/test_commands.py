"""The commands of scripts/: short, and there where README and docs name them."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = sorted((ROOT / "scripts").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "examples").rglob("*.md"))


@pytest.mark.parametrize("path", COMMANDS, ids=[path.stem for path in COMMANDS])
def test_a_command_is_a_few_lines_that_call_the_lab(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 12
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    (module,) = [node.module or "" for node in nodes]
    assert module.startswith("lab.") and [alias.name for alias in nodes[0].names] == ["main"]
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_pages_name_scripts_that_are_there(page: Path) -> None:
    named = re.findall(r"\bscripts/[\w/]+\.(?:py|sh)\b", page.read_text(encoding="utf-8"))
    assert not {name for name in named if not (ROOT / name).is_file()}


def test_every_command_is_named_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [path.name for path in COMMANDS if f"{path.stem}." not in text]


def test_files_of_the_lab_stay_small() -> None:
    for path in sorted((ROOT / "scripts" / "lab").rglob("*.py")):
        count = len(path.read_text(encoding="utf-8").splitlines())
        assert count <= 400, f"{path}: {count} lines"

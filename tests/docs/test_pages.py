"""The documents are complete and true: every name is on its page, every link and file is there."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from vllm_kvcompress import __version__
from vllm_kvcompress.cli.main import make_parser
from vllm_kvcompress.config.reading import preset_names
from vllm_kvcompress.config.settings import CompressionConfig, PolicyConfig
from vllm_kvcompress.host.prometheus import (
    COUNTERS,
    PREFIX,
    SESSION_OUTCOMES,
    SESSION_REASONS,
    SKIP_REASONS,
)
from vllm_kvcompress.registry import load_policy_class, policy_names
from vllm_kvcompress.request_options import REQUEST_KEYS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OTHERS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [ROOT / name for name in OTHERS]
PAGES += sorted(DOCS.rglob("*.md")) + sorted((ROOT / "examples").rglob("*.md"))

LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE_FILE = re.compile(r"(?<![\w/.*-])((?:[\w.-]+/)+[\w.-]+\.(?:py|sh|npz))\b(?![/*])")


def rows(page: Path) -> dict[str, list[str]]:
    """Cells of every table row of a page, by the name in backticks that its first cell is."""
    found = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and (names := re.findall(r"`([^`]+)`", cells[0])):
            found |= dict.fromkeys(names, cells)
    return found


def fields(model: type[BaseModel], seen: set[type]) -> Iterator[tuple[str, Any]]:
    """Dotted names of all fields and their defaults; a model is walked where it comes first."""
    for name, field in model.model_fields.items():
        yield name, field.default
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel) and part not in seen:
                seen.add(part)
                yield from ((f"{name}.{inner}", default) for inner, default in fields(part, seen))


SETTING_FIELDS = dict(fields(CompressionConfig, set()))


def shown(default: Any) -> str | None:
    """A default as the page writes it; None where the page uses words."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, int | float):
        return f"{default:g}"
    return default if isinstance(default, str) else None


# --- configuration ------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTING_FIELDS)
def test_every_field_of_a_setting_has_a_row_with_its_default(name: str) -> None:
    table = rows(DOCS / "configuration.md")
    assert name in table, f"docs/configuration.md has no row for {name}"
    default = shown(SETTING_FIELDS[name])
    if default is not None:
        assert table[name][-1].strip("`") == default


@pytest.mark.parametrize("name", policy_names())
def test_every_parameter_of_a_policy_has_a_row_with_its_default(name: str) -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert f"| `{name}` |" in text
    for parameter, field in load_policy_class(name).model_fields.items():
        found = re.search(rf"^\| `{name}` \| `{parameter}` \|.*\| (.*) \|$", text, re.MULTILINE)
        assert found, f"docs/configuration.md has no row for {name}'s {parameter}"
        default = shown(field.default)
        if isinstance(field.default, PolicyConfig):
            default = field.default.name
        if field.default is None:
            default = "none"
        assert field.default is PydanticUndefined or found[1].strip("`") == default


def test_every_preset_is_on_the_page_of_policies() -> None:
    table = rows(DOCS / "policies.md")
    assert not set(preset_names()) - table.keys()


# --- requests, metrics, commands ----------------------------------------------------------


def test_the_keys_of_a_request_are_those_of_the_page() -> None:
    assert rows(DOCS / "request-options.md").keys() == set(REQUEST_KEYS)


def test_every_metric_and_reason_has_a_row_with_its_labels() -> None:
    table = rows(DOCS / "metrics.md")
    wanted = {f"{PREFIX}{name}_total": set(family.labels) for name, family in COUNTERS.items()}
    wanted |= {f"{PREFIX}kept_ratio": {"policy"}, f"{PREFIX}time_seconds": set()}
    assert table.keys() == wanted.keys() | set(SKIP_REASONS)
    for name, labels in wanted.items():
        assert set(re.findall(r"`(\w+)`", table[name][1])) == labels, name


def test_every_outcome_of_a_conversation_has_a_row() -> None:
    assert rows(DOCS / "sessions.md").keys() == {*SESSION_OUTCOMES, *SESSION_REASONS}


def test_every_command_is_on_its_page() -> None:
    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    (commands,) = [action for action in make_parser()._actions if action.choices]
    assert commands.choices is not None
    for name in commands.choices:
        assert f"kvcompress {name} " in text


# --- numbers and versions -----------------------------------------------------------------


def test_the_readme_quotes_the_reports_and_the_computed_costs() -> None:
    cells = {}
    lines = (DOCS / "reports" / "smollm2" / "cells.csv").read_text(encoding="utf-8").splitlines()
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        if (row["task"], row["length"], row["protocol"]) == ("niah_single", "1500", "visible"):
            mean, low, high = (round(100 * float(row[key])) for key in ("mean", "low", "high"))
            cells[row["policy"], row["budget"]] = (f"{mean} ({low}-{high})", row["n"])
    costs = {}
    for line in (DOCS / "performance.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            parts = [part.strip() for part in line.strip("|").split("|")]
            costs[parts[0].split("`")[1]] = parts[7].replace("%", " %")
    for name, (_, _, large, small, n, cost) in rows(ROOT / "README.md").items():
        assert cost == costs[name], name
        if (name, "0.12") in cells:
            assert ((large, n), (small, n)) == (cells[name, "0.12"], cells[name, "0.06"]), name
        else:
            assert not large, name


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", text, re.MULTILINE)[0] == __version__


# --- links and files ----------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    """The site's strict build looks at anchors, too; this one also at pages outside docs/."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:|#", link):
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_code_file_that_a_page_names_is_there(page: Path) -> None:
    """Paths from the top, from the package, or from the page's own folder."""
    places = (ROOT, ROOT / "vllm_kvcompress", page.parent)
    for name in CODE_FILE.findall(page.read_text(encoding="utf-8")):
        if "NAME" not in name:
            assert any((place / name).exists() for place in places), name

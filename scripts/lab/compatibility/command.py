"""Writes the tables of docs/compatibility.md and docs/model-classes.md.

A row that works names tests; a row that is refused names the sentence that the checks give for its
stand-in. tests/docs/test_compatibility.py runs every stand-in through the checks and looks for
every test, so that neither can drift. To serve what was refused, replace `refused(...)` by
`works(...)` in families.py or features.py and write the pages anew:

    python scripts/compatibility.py
"""

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from lab.compatibility.families import FAMILIES
from lab.compatibility.features import FEATURES
from lab.compatibility.rows import UNTRIED, Row
from lab.model_classes import ACCEPTED, REFUSED, TABLE, UNKNOWN

DOCS = Path(__file__).parents[3] / "docs"
PAGE, CLASSES_PAGE = DOCS / "compatibility.md", DOCS / "model-classes.md"


def table(rows: Iterable[Row]) -> str:
    """Markdown of some rows."""
    lines = ["| | today | what works, or the sentence | shown by |", "|---|---|---|---|"]
    for row in rows:
        state = "not tried" if row.tests == (UNTRIED,) else "works" if row.tests else "refused"
        shown = "the check itself"
        if row.tests:
            shown = UNTRIED if row.tests == (UNTRIED,) else "<br>".join(map(_shown, row.tests))
        lines.append(f"| {row.name} | {state} | {row.says} | {shown} |")
    return "\n".join(lines) + "\n"


def _shown(test: str) -> str:
    return f"`{test}`"


def class_counts(rows: list[dict[str, str]]) -> str:
    """Markdown: how many classes of each kind are accepted, before and after."""
    lines = ["| in vLLM's registry as | classes | | accepted | refused | unknown |"]
    lines.append("|---|---|---|---|---|---|")
    kinds = [*dict.fromkeys(row["kind"] for row in rows)]
    for kind in [*kinds, "all"]:
        own = [row for row in rows if kind in (row["kind"], "all")]
        for column in ("before", "after"):
            count = Counter(row[column] for row in own)
            numbers = " | ".join(str(count[each]) for each in (ACCEPTED, REFUSED, UNKNOWN))
            lines.append(f"| {kind} | {len(own)} | {column} | {numbers} |")
    return "\n".join(lines) + "\n"


def class_table(rows: list[dict[str, str]]) -> str:
    """Markdown: every class."""
    lines = ["| class | in the registry as | judged by | before | after | why not, after |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        why = re.sub(r"^--kv-compression: |, or drop --kv-compression\.$", "", row["why_after"])
        cells = [row[name] for name in ("kind", "configuration", "before", "after")]
        lines.append(" | ".join([f"| `{row['architecture']}`", *cells, _escaped(why)]) + " |")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return re.sub(r"([|<>\[\]*_`])", r"\\\1", text)


def read_classes() -> list[dict[str, str]]:
    """Rows of model_classes.csv."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def filled(text: str, tables: Mapping[str, str]) -> str:
    """A page with its tables between their marks."""
    for name, body in tables.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        assert found, f"the page has no place for {name}"
        text = f"{before}{begin}\n{body}{end}{after}"
    return text


def pages() -> dict[Path, str]:
    """What both pages should be."""
    classes = read_classes()
    tables = {
        PAGE: {
            "families": table(FAMILIES),
            "features": table(FEATURES),
            "counts": class_counts(classes),
        },
        CLASSES_PAGE: {"classes": class_table(classes)},
    }
    return {path: filled(path.read_text("utf-8"), own) for path, own in tables.items()}


def main() -> int:
    """Write the tables."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

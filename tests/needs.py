"""Which packages a test file cannot be imported without.

Arithmetic, configuration and the command line are tested where only the light requirements and
torch are installed. A file whose imports reach one that is not there is left out, and the header
of the run says how many were.
"""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPTIONAL = (
    "vllm",
    "triton",
    "transformers",
    "safetensors",
    "prometheus_client",
    "httpx",
    "matplotlib",
)


def is_missing(package: str) -> bool:
    """Whether a package of `OPTIONAL` cannot be imported."""
    try:
        return find_spec(package) is None
    except ValueError:  # what stands in for it is no module
        return True


@cache
def needed(path: Path) -> frozenset[str]:
    """Those of `OPTIONAL` that importing a file imports, by way of this repository's files too."""
    seen: set[Path] = set()
    packages: set[str] = set()
    stack = [path]
    while stack:
        file = stack.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in _imported(file):
            top = name.split(".")[0]
            if top in OPTIONAL:
                packages.add(top)
            stack += _files(name)
    return frozenset(packages)


def _imported(path: Path) -> Iterator[str]:
    """Names that running the file's top level imports; `a.b` for `from a import b` as well."""
    stack: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            stack += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            stack += ast.iter_child_nodes(node)


def _files(name: str) -> list[Path]:
    """Files of this repository that importing a dotted name runs, packages above it included."""
    if name.startswith("vllm_kvcompress.kernels"):
        name = name.removeprefix("vllm_kvcompress.")
    elif not name.startswith(("vllm_kvcompress", "tests", "lab")):
        return []
    place = ROOT / "scripts" if name.startswith("lab") else ROOT
    found = []
    for part in name.split("."):
        place /= part
        found += [
            each for each in (place / "__init__.py", place.with_suffix(".py")) if each.exists()
        ]
    return found

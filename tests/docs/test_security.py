"""SECURITY.md against the code, and what setup.py depends on: the audit that needs no network."""

import ast
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vllm_kvcompress.config.yaml_reader import MAX_BYTES, MAX_DEPTH, MAX_NODES
from vllm_kvcompress.core.classifier import EDGE_TOKENS, MAX_CHARS
from vllm_kvcompress.errors import MAX_LENGTH
from vllm_kvcompress.request_options import MAX_PINS, MAX_SESSION_LEN

ROOT = Path(__file__).parents[2]

NO_UPPER = {
    "rich": "its documented tables alone are used",
    "torch": "vLLM pins it",
    "triton": "vLLM's torch pins it",
}
"""Of what a server imports; tools of developers may grow."""
NO_LOWER = {"xformers": "the one that fits the installed torch"}
OPTIONAL = {
    "vllm": "the extras cpu and cuda; the command line works without",
    "transformers": "vLLM's own dependency",
    "httpx": "the extra eval: kvcompress eval --url",
    "matplotlib": "the extra eval: plots of kvcompress codebook",
}
"""Imported where they are needed, with a sentence if they are missing."""
MODULES = {"PyYAML": "yaml"}


def setup_call() -> ast.Call:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = [
        each
        for each in ast.walk(tree)
        if isinstance(each, ast.Call) and getattr(each.func, "id", "") == "setup"
    ]
    return call


def requirements() -> dict[str, list[tuple[Requirement, str]]]:
    """By extra, "" for what is always installed: requirements and the reasons behind them."""
    lines = (ROOT / "setup.py").read_text(encoding="utf-8").split("\n")
    keywords = {each.arg: each.value for each in setup_call().keywords}
    extras = keywords["extras_require"]
    assert isinstance(extras, ast.Dict)
    lists = {"": keywords["install_requires"]}
    for key, value in zip(extras.keys, extras.values, strict=True):
        assert isinstance(key, ast.Constant)
        lists[key.value] = value
    found = {}
    for extra, node in lists.items():
        assert isinstance(node, ast.List)
        found[extra] = [
            (Requirement(ast.literal_eval(each)), lines[each.lineno - 1].partition("  # ")[2])
            for each in node.elts
        ]
    return found


EVERY = [(extra, *each) for extra, some in requirements().items() for each in some]


@pytest.mark.parametrize(("extra", "needed", "reason"), EVERY, ids=lambda each: str(each))
def test_every_dependency_has_bounds_and_a_reason(extra, needed, reason) -> None:
    assert len(reason) > 3, "a reason in the same line of setup.py"
    signs = {each.operator for each in needed.specifier}
    if needed.name not in NO_LOWER:
        assert signs & {">=", "=="}, "from which version on does it work?"
    if not extra and needed.name not in NO_UPPER:
        assert signs & {"<", "=="}, "below which version is it known to work?"
    try:
        installed = version(needed.name)
    except PackageNotFoundError:
        assert extra in ("cuda", "xformers", "cpu", "eval"), "not installed"
        return
    assert needed.specifier.contains(installed.partition("+")[0]), installed


def imported() -> dict[str, str]:
    """Packages of others that ours imports anywhere, and a file that does."""
    found = {}
    files = [*(ROOT / "vllm_kvcompress").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [each.name for each in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                found[name.partition(".")[0]] = str(path.relative_to(ROOT))
    ours = {"vllm_kvcompress", "__future__", *sys.stdlib_module_names}
    return {name: path for name, path in found.items() if name not in ours}


def test_nothing_is_imported_that_is_not_declared() -> None:
    declared = {MODULES.get(each.name, each.name) for each, _ in requirements()[""]}
    # pydantic's own core, of the same version.
    found = {name: path for name, path in imported().items() if name != "pydantic_core"}
    assert found.keys() - declared <= OPTIONAL.keys(), found
    assert declared <= found.keys(), "declared and never imported"
    assert OPTIONAL.keys() <= found.keys()


def test_the_figures_in_security_md() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for figure in (
        f"{MAX_LENGTH} characters",
        f"{MAX_PINS} ranges",
        f"{MAX_SESSION_LEN} characters",
        f"{MAX_BYTES // 1024} KiB",
        f"{MAX_DEPTH} deep",
        f"{MAX_NODES:,} values",
        f"{EDGE_TOKENS} tokens",
        f"{MAX_CHARS:,} characters",
    ):
        assert figure in text, figure

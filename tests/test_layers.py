"""Who may import whom: parses the imports of every file and compares with the table below."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "vllm_kvcompress"

# A module may import modules of lower layers and of its own folder; a file that is lower than its
# folder is named. core and worker, on the two sides of the engine, never see each other.
LAYERS = {
    "__init__": 0,
    "errors": 0,
    "plans": 0,
    "kernels": 0,
    "configs": 0,
    "metrics": 1,
    "registry": 1,
    "cli.common": 1,
    "spec": 4,
    "config": 2,
    "lengths": 3,
    "request_options": 4,
    "reuse_checks": 3,
    "policies": 4,
    "messages": 4,
    "host.attention_probe": 3,
    "host.cache_checks": 3,
    "host.model_checks": 4,
    "host.hybrid_checks": 4,
    "host.latent_checks": 4,
    "host.part_checks": 5,
    "host.pipeline_checks": 6,
    "host.speculation_checks": 5,
    "host.checks": 6.5,
    "speed": 5,
    "core": 7,
    "worker": 7,
    "host": 8,
    "plugin": 9,
    "doctor": 9,
    "evaluation": 9,
    "cli": 10,
}
OWN = {name for name in LAYERS if "." in name}

# These run without vLLM. `host.cpu_triton` is loaded while vLLM looks for its platform.
PURE = {"errors", "plans", "registry", "config", "lengths", "request_options", "messages"}
PURE |= {"reuse_checks"}
PURE |= {"host.latent_checks"}  # the command line asks it, too
PURE |= {"metrics", "kernels", "policies", "speed", "cli", "host.cpu_triton", "doctor.savings"}
PURE |= {"host.interpreter_speed"}  # called by host.cpu_triton
PURE |= {"doctor.findings", "core.classifier", "core.planner", "core.tracked_request", "core.turns"}
PURE |= {"core.query_slots", "core.draft.history", "core.draft.views", "core.draft.report"}
PURE_COMPACTIONS = {
    "worker.batch", "worker.codebook.slots", "worker.codebook.warm_up",
    "worker.codebook.working_memory", "worker.codebook.writer", "worker.compaction.compactor",
    "worker.compaction.faults", "worker.compaction.group_scores", "worker.compaction.timer",
    "worker.compaction.warm_up",
    "worker.compaction.working_memory", "worker.draft.linked_blocks", "worker.draft.views",
    "worker.features", "worker.host_mirror", "worker.layout.base", "worker.layout.layer_cache",
    "worker.layout.latent", "worker.layout.numbers", "worker.layout.packed",
    "worker.layout.strided", "worker.queries.taps",
}  # fmt: skip
PURE |= PURE_COMPACTIONS

# --- modes --------------------------------------------------------------------------------

MODES = re.compile("draft|codebook", re.IGNORECASE)

# Files and folders that are about a mode, or about all of them.
ROOMS = (
    "worker.draft", "worker.codebook", "core.draft", "config.codebook", "config.mode_checks",
    "lengths.codebook",
    "kernels.codebook", "kernels.torch_backend.codebook",
    "evaluation", "cli", "speed",
)  # fmt: skip

# Lines of code elsewhere that name a mode, at most: settings and options that users write, what
# the host calls so, and a registration of each mode. Lower a number when you can.
ALLOWED = {
    "config.cache_dtypes": 2,
    "config.idle_fields": 2,
    "config.merging": 3,
    "config.reading": 1,
    "config.settings": 36,
    "core.planner": 2,
    "core.report": 6,
    "core.scheduler": 4,
    "core.tracked_request": 1,
    "doctor.savings": 2,
    "host.checks": 30,
    "host.cli_options": 7,
    "host.hooks": 11,
    "host.latent_checks": 6,
    "host.model_checks": 2,
    "host.part_checks": 1,
    "host.pipeline_checks": 8,
    "host.prometheus": 13,
    "host.speculation_checks": 15,
    "lengths.budgets": 6,
    "lengths.decode_queries": 4,
    "kernels.dispatch": 6,
    "kernels.torch_backend.__init__": 4,
    "kernels.triton_backend": 4,
    "lengths.sizing": 2,
    "messages": 4,
    "metrics": 5,
    "plans": 1,
    "request_options": 17,
    "reuse_checks": 10,
    "spec": 1,
    "worker.compaction.compactor": 1,
    "worker.compaction.working_memory": 2,
    "worker.features": 2,
    "worker.layer_specs": 2,
    "worker.model_runner": 7,
    "worker.modes": 3,
}


def modules() -> list[tuple[str, Path]]:
    found = [(path.relative_to(ROOT / PACKAGE), path) for path in (ROOT / PACKAGE).rglob("*.py")]
    named = [(str(rel.with_suffix("")).replace("/", "."), path) for rel, path in found]
    found = [(path.relative_to(ROOT), path) for path in (ROOT / "kernels").rglob("*.py")]
    named += [(str(rel.with_suffix("")).replace("/", "."), path) for rel, path in found]
    return sorted(named)


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in a file, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.append((node.lineno, node.module or ""))
    return found


def layer(name: str) -> int:
    top = name.split(".")[0]
    return LAYERS.get(name, LAYERS[top])


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_nothing_imports_upwards(name: str, path: Path) -> None:
    top = name.split(".")[0]
    for line, target in imports(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {target}"
        if target.split(".")[0] == "kernels":
            pytest.fail(f"{where}: the kernels are vllm_kvcompress.kernels, once")
        if target.split(".")[0] == "lab":
            pytest.fail(f"{where}: scripts/lab is not installed")
        if target.split(".")[0] == "vllm":
            assert not {top, name} & PURE, f"{where}: {name} knows no vLLM"
        if not target.startswith(f"{PACKAGE}."):
            continue
        other = target.removeprefix(f"{PACKAGE}.")
        if name in PURE and top == "core":
            pure = {other, other.split(".")[0]} & PURE
            assert pure, f"{where}, which may know vLLM"
        if other.split(".")[0] != top or {other, name} & OWN:
            assert layer(other) < layer(name), where


def test_every_folder_has_a_layer() -> None:
    names = {name for name, _ in modules()}
    assert {name.split(".")[0] for name in names} <= LAYERS.keys()
    assert LAYERS.keys() <= names | {name.split(".")[0] for name in names} | {"configs"}


def test_importing_the_package_is_light() -> None:
    """The API server's help text must not wait for torch."""
    light = {"__init__", "errors", "plans", "registry", "config", "cli.main", "cli.common"}
    light |= {"lengths.budgets", "lengths.layer_budgets"}
    for name, path in modules():
        if light & {name, name.split(".")[0]}:
            for line, target in imports(path):
                assert target.split(".")[0] not in ("torch", "vllm"), f"{name}:{line}"


def test_files_stay_small() -> None:
    for name, path in modules():
        count = len(path.read_text(encoding="utf-8").splitlines())
        assert count <= (150 if name.startswith("policies.") else 400), f"{path}: {count} lines"
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        count = len(path.read_text(encoding="utf-8").splitlines())
        assert count <= 400, f"{path}: {count} lines"


HOT = [
    path
    for name, path in modules()
    if name.split(".")[0] in ("worker", "kernels", "policies")
    and not name.startswith("kernels.torch_backend")  # CPU only, where there is nothing to wait for
]


@pytest.mark.parametrize("path", HOT, ids=[path.stem for path in HOT])
def test_hot_paths_do_not_wait_for_the_device(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if "# waits:" in lines[node.lineno - 1]:  # with the reason why it may
                continue
            assert node.func.attr not in ("item", "tolist", "cpu", "synchronize"), (
                f"{path.name}:{node.lineno} calls .{node.func.attr}()"
            )


def test_policy_names_are_not_branched_on() -> None:
    names = {path.stem for path in (ROOT / PACKAGE / "policies").glob("*.py")} - {"base", "random"}
    for name, path in modules():
        if name.startswith("policies."):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                constants = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant)]
                assert not names & {c for c in constants if isinstance(c, str)}, (
                    f"{path.name}:{node.lineno} branches on a policy's name"
                )


def lines_of_modes(path: Path) -> list[int]:
    """Numbers of the lines that name a mode in code: comments and docstrings may."""
    text = path.read_text(encoding="utf-8")
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        # Strings that stand alone: docstrings of modules, classes, functions and constants.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            parts = enumerate(token.string.split("\n"), token.start[0])
            found |= {number for number, part in parts if MODES.search(part)}
    return sorted(found - prose)


def test_modes_are_named_in_their_rooms() -> None:
    counts = {
        name: len(lines_of_modes(path)) for name, path in modules() if not name.startswith(ROOMS)
    }
    grown = {name: count for name, count in counts.items() if count > ALLOWED.get(name, 0)}
    assert not grown, f"more lines name a mode than before: {grown}"
    assert ALLOWED.keys() <= {name for name, count in counts.items() if count}, "lower the list"


def test_compactions_import_without_vllm() -> None:
    # These name vLLM's batches as types alone.
    others = {"worker.codebook.reader", "worker.lengths"}
    others |= {f"worker.queries.{name}" for name in ("prompt", "ring", "window")}
    names = ", ".join(f"{PACKAGE}.{name}" for name in sorted(PURE_COMPACTIONS | others))
    code = f"import sys; sys.modules['vllm'] = None; import {names}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

"""Who may import whom: parses the imports of every file and compares with the table below."""

import ast
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
    "spec": 1,
    "config": 2,
    "lengths": 3,
    "request_options": 4,
    "policies": 4,
    "messages": 4,
    "host.checks": 5,
    "speed": 5,
    "core": 6,
    "worker": 6,
    "host": 7,
    "plugin": 8,
    "doctor": 8,
    "evaluation": 8,
    "cli": 9,
}
OWN = {name for name in LAYERS if "." in name}

# These run without vLLM. `host.cpu_triton` is loaded while vLLM looks for its platform.
PURE = {"errors", "plans", "registry", "config", "lengths", "request_options", "messages"}
PURE |= {"metrics", "kernels", "policies", "speed", "cli", "host.cpu_triton", "doctor.savings"}
PURE |= {"doctor.findings", "core.classifier"}


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
        if target.split(".")[0] == "vllm":
            assert not {top, name} & PURE, f"{where}: {name} knows no vLLM"
        if not target.startswith(f"{PACKAGE}."):
            continue
        other = target.removeprefix(f"{PACKAGE}.")
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

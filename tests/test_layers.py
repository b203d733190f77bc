"""Who may import whom: parses the imports of every file and compares with the table below."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "vllm_kvcompress"

# A module may import modules of lower layers and of its own folder. core and worker, on the two
# sides of the engine, never see each other.
LAYERS = {
    "__init__": 0,
    "cpu_triton": 0,
    "errors": 0,
    "plans": 0,
    "kernels": 0,
    "configs": 0,
    "metrics": 1,
    "prometheus": 1,
    "registry": 1,
    "spec": 1,
    "task_classifier": 1,
    "codebook_settings": 1,
    "plain_values": 1,
    "yaml_reader": 1,
    "validation_messages": 1,
    "merging": 1,
    "cli_common": 1,
    "settings": 2,
    "layer_budgets": 3,
    "codebook_lengths": 3,
    "idle_fields": 3,
    "decode_queries": 3,
    "config": 4,
    "budgets": 4,
    "request_options": 5,
    "serve_options": 5,
    "policies": 4,
    "messages": 4,
    "geometry": 4,
    "sizing": 5,
    "speed": 6,
    "checks": 5,
    "core": 6,
    "worker": 6,
    "vllm_hooks": 7,
    "plugin": 8,
    "evaluation": 8,
    "findings": 5,
    "doctor_savings": 6,
    "doctor": 8,
    "cli_measuring": 9,
    "cli_codebook": 10,
    "cli_doctor": 10,
    "cli_eval": 10,
    "cli_speed": 10,
    "cli_inspect": 10,
    "cli_tune": 10,
    "cli": 11,
}
PURE = {"errors", "plans", "registry", "settings", "config", "request_options", "layer_budgets"}
PURE |= {"budgets", "metrics", "kernels", "policies", "cpu_triton", "task_classifier", "sizing"}
PURE |= {"plain_values", "yaml_reader", "validation_messages", "merging", "idle_fields"}
PURE |= {"messages", "cli", "cli_codebook", "cli_common", "codebook_lengths", "codebook_settings"}
PURE |= {"cli_doctor", "cli_eval", "cli_inspect", "cli_measuring", "cli_tune", "doctor_savings"}
PURE |= {"findings", "geometry", "speed", "cli_speed", "decode_queries"}


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
            assert top not in PURE, f"{where}: {top} knows no vLLM"
        if not target.startswith(f"{PACKAGE}."):
            continue
        other = target.split(".")[1]
        if other != top:
            assert LAYERS[other] < LAYERS[top], where


def test_every_folder_has_a_layer() -> None:
    assert {name.split(".")[0] for name, _ in modules()} <= LAYERS.keys()


def test_importing_the_package_is_light() -> None:
    """The API server's help text must not wait for torch."""
    names = ["__init__", "errors", "plans", "registry", "settings", "config", "budgets"]
    for name in [*names, "cli", "cli_common"]:
        for line, target in imports(ROOT / PACKAGE / f"{name}.py"):
            assert target.split(".")[0] not in ("torch", "vllm"), f"{name}.py:{line}"


def test_files_stay_small() -> None:
    for name, path in modules():
        count = len(path.read_text(encoding="utf-8").splitlines())
        assert count <= (150 if name.startswith("policies.") else 400), f"{path}: {count} lines"


HOT = [
    path
    for name, path in modules()
    if name.split(".")[0] in ("worker", "kernels", "policies")
    and not name.startswith("kernels.reference")  # CPU only, where there is nothing to wait for
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

"""setup.sh, demo.sh and test.sh, without a download."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELL_SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
CPU_TORCH = "2.13.0+cpu"

# Stands for python3.12, for .venv/bin/python and for pip: logs what it is asked to do.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *--dry-run*) echo '{"version": "1", "install": [{"metadata": {"version": "'$FAKE_TORCH'"}}]}' ;;
esac
case "$*" in -m*) echo "$*" >>"$FAKE_CALLS" ;; esac
"""


def write_tool(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what setup.sh reads."""
    top = tmp_path / "checkout"
    (top / "scripts" / "vllm-metadata").mkdir(parents=True)
    for name in (
        "setup.py",
        "pyproject.toml",
        "scripts/setup.sh",
        "scripts/vllm-metadata/setup.py",
    ):
        shutil.copy(ROOT / name, top / name)
    return top


def run_setup(checkout: Path, torch: str) -> subprocess.CompletedProcess[str]:
    """Run setup.sh on a pretended Linux without a GPU whose pip offers one version of torch."""
    tools = checkout.parent / "bin"
    tools.mkdir(exist_ok=True)
    write_tool(tools / "python3.12", FAKE_PYTHON)
    write_tool(tools / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    write_tool(tools / "uname", '#!/bin/sh\n[ "$1" = -s ] && echo Linux || echo x86_64\n')
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "FAKE_TORCH": torch,
        "FAKE_CALLS": str(checkout.parent / "calls"),
    }
    command = [str(checkout / "scripts" / "setup.sh"), "eval"]
    return subprocess.run(
        command, env=environment, cwd="/", capture_output=True, text=True, check=False
    )


def calls(checkout: Path) -> list[str]:
    return (checkout.parent / "calls").read_text().splitlines()


# --- shell scripts ------------------------------------------------------------------------


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_script_is_executable_and_parses(script):
    assert script.stat().st_mode & stat.S_IXUSR
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_expected_scripts_are_there():
    names = {script.name for script in SHELL_SCRIPTS}
    assert {"setup.sh", "demo.sh", "test.sh", "run"} <= names


def test_ci_calls_test_sh():
    assert "./scripts/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_setup_installs_on_a_cpu(checkout):
    done = run_setup(checkout, CPU_TORCH)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line[:5] for line in done.stdout.splitlines()] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    seen = calls(checkout)
    assert any("install" in call and call.endswith("-e .[eval,cpu]") for call in seen)
    assert any("uninstall" in call and "torchvision torchaudio torchcodec" in call for call in seen)
    assert not list((checkout / "scripts" / "vllm-metadata").glob("*.egg-info"))


def test_setup_runs_once(checkout):
    run_setup(checkout, CPU_TORCH)
    before = calls(checkout)
    done = run_setup(checkout, CPU_TORCH)
    assert done.returncode == 0
    assert "has everything" in done.stdout
    assert calls(checkout) == before


def test_setup_runs_again_when_requirements_change(checkout):
    run_setup(checkout, CPU_TORCH)
    before = calls(checkout)
    with (checkout / "setup.py").open("a") as file:
        file.write("# changed\n")
    assert run_setup(checkout, CPU_TORCH).returncode == 0
    assert len(calls(checkout)) > len(before)


def test_setup_refuses_a_cuda_build_of_torch(checkout):
    done = run_setup(checkout, "2.13.0")
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert "torch==2.13.0" in sentence
    assert "PIP_EXTRA_INDEX_URL" in sentence
    assert "PyTorch's CPU wheel index" in sentence
    assert not any("-e ." in call for call in calls(checkout))


def test_setup_names_the_missing_python(tmp_path):
    script = ROOT / "scripts" / "setup.sh"
    command = f'source "{script}"; is_supported_python() {{ false; }}; find_python'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "setup: no Python 3.11 or 3.12 on the PATH: install one of them and run this again.\n"
    )


@pytest.mark.parametrize(("arguments", "paths"), [([], []), (["tests/core", "-q"], ["tests/core"])])
@pytest.mark.parametrize("failing", [None, "mypy"])
def test_test_sh_runs_every_check_and_the_tests_that_are_named(
    tmp_path: Path, arguments: list[str], paths: list[str], failing: str | None
) -> None:
    for folder in ("scripts/lab", ".venv/bin", "vllm_kvcompress", "kernels"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "test.sh", tmp_path / "scripts")
    tools = {
        name: tmp_path / ".venv" / "bin" / name for name in ("ruff", "mypy", "mkdocs", "pytest")
    }
    for name, path in {"setup": tmp_path / "scripts" / "setup.sh", **tools}.items():
        status = 1 if name == failing else 0
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/log"\nexit {status}\n')
        path.chmod(0o755)
    # Where CI has fetched sources of another vLLM, test.sh would run tests over them as well.
    environment = {k: v for k, v in os.environ.items() if k != "KVCOMPRESS_VLLM_SOURCES"}
    done = subprocess.run(
        [tmp_path / "scripts" / "test.sh", *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == (1 if failing else 0), done.stderr
    ran = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert [words[0] for words in ran] == [
        "setup",
        "ruff",
        "ruff",
        "mypy",
        "mkdocs",
        "pytest",
    ]
    assert [word for word in ran[-1] if word.startswith("tests")] == paths

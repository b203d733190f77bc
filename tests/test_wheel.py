"""What a wheel holds: the package, and nothing of the laboratory."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lab.classifier import instructions
from lab.places import SCRIPTS

SOURCES = ("vllm_kvcompress", "kernels", "configs", "scripts")
FILES = ("setup.py", "pyproject.toml", "README.md")


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a wheel that is built from a copy: setuptools leaves folders beside setup.py."""
    copy = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(root / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(copy / "out"), str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (copy / "out").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_package_alone_is_in_the_wheel(wheel: dict[str, bytes]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vllm_kvcompress"}
    inside = [name for name in wheel if name.startswith("vllm_kvcompress/")]
    assert {Path(name).suffix for name in inside} == {".py", ".yaml", ".npz"}
    assert not [name for name in inside if "/lab/" in name]
    for needed in ("plugin.py", "core/classifier.npz", "configs/auto.yaml", "kernels/__init__.py"):
        assert any(name.endswith(needed) for name in inside), needed


def test_no_file_of_the_lab_is_in_the_wheel(wheel: dict[str, bytes]) -> None:
    held = set(wheel.values())
    files = [path for path in (SCRIPTS / "lab").rglob("*.py") if path.stat().st_size > 200]
    assert files and not [path.name for path in files if path.read_bytes() in held]


def test_no_text_of_the_classifier_is_in_the_wheel(wheel: dict[str, bytes]) -> None:
    splits = ("train", "heldout", "test", "longbench")
    styles = [style for split in splits for style in instructions.styles_of(split)]
    texts = {part for style in styles for part in (style.before, style.after) if len(part) > 80}
    assert len(texts) > 50
    held = b"".join(wheel.values()).decode("utf-8", "replace")
    assert not [text for text in texts if text in held]

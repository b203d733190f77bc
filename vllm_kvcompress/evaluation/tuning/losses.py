"""Losses on disk: one JSON line per prompt and setting, in a folder that a run can go on with.

    out/run.json      what decides the losses, and with what they were measured
    out/losses.jsonl  one line per prompt and setting

Target, confidence, splits and seed are not among what decides them: the same command with another
target chooses anew and measures nothing.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.tuning.grid import Candidate
from vllm_kvcompress.evaluation.tuning.prompts_file import OwnPrompt
from vllm_kvcompress.evaluation.whole_files import write_whole

RUN, LOSSES = "run.json", "losses.jsonl"

Key = tuple[str, str]
"""Digests of a prompt and of a setting."""


@dataclass(frozen=True)
class Loss:
    """One prompt under one setting.

    Attributes
    ----------
    prompt, setting : str
        Digests.
    name : str
        Of the setting, for the reader.
    loss : float
        0 (as good as the whole cache) to 1.
    kept : float
        Share of the prompt's cache bytes held after compaction, whole blocks included.
    prompt_tokens : int
        Length of the prompt.
    seconds : float
        Wall time of this setting alone, where several are decoded together its part of theirs.
    """

    prompt: str
    setting: str
    name: str
    loss: float
    kept: float
    prompt_tokens: int
    seconds: float

    @property
    def key(self) -> Key:
        """What is measured once."""
        return self.prompt, self.setting


class LossFolder:
    """The files of one run. All losses of a prompt are on disk before the next begins."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, asked: dict[str, Any], measured_with: dict[str, Any]) -> list[Loss]:
        """Begin, or go on with what the folder holds; what is measured already.

        Parameters
        ----------
        asked : dict
            What decides a loss, beside prompt and setting.
        measured_with : dict
            Command and versions, for the reader.

        Raises
        ------
        ConfigError
            If the folder holds another run, or a line that is no loss.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        about = self.path / RUN
        if about.is_file():
            self._check_same(_read_asked(about), json.loads(json.dumps(asked)))
        else:
            text = json.dumps({"asked": asked, "measured_with": measured_with}, indent=1)
            write_whole(about, text + "\n")
        return self._read()

    def add(self, losses: Iterable[Loss]) -> None:
        """Append losses; they are on disk when this returns."""
        lines = "".join(json.dumps(asdict(each)) + "\n" for each in losses)
        with (self.path / LOSSES).open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def _check_same(self, known: dict[str, Any], asked: dict[str, Any]) -> None:
        for name in sorted({**known, **asked}):
            if known.get(name) != asked.get(name):
                raise ConfigError(
                    f"--out: {self.path} holds another run ({name} was {known.get(name)!r}, is "
                    f"{asked.get(name)!r}): choose another folder, or the same options to go on."
                )

    def _read(self) -> list[Loss]:
        path = self.path / LOSSES
        if not path.is_file():
            return []
        with path.open("rb+") as file:
            content = file.read()
            end = content.rfind(b"\n") + 1
            file.truncate(end)  # a crash may have left half a line
        lines = content[:end].decode("utf-8", errors="replace").splitlines()
        return [_loss(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _read_asked(about: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(about.read_text(encoding="utf-8"))["asked"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"--out: {about} is no file of kvcompress tune.") from None


def _loss(line: str, place: str) -> Loss:
    try:
        found = json.loads(line)
        loss = Loss(**found)
        is_right = set(found) == {each.name for each in fields(Loss)} and 0 <= loss.loss <= 1
    except (ValueError, TypeError, RecursionError):
        is_right = False
    if not is_right:
        raise ConfigError(f"{place}: no loss of kvcompress tune; delete the line to measure anew.")
    return loss


# --- as a table ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LossTable:
    """Losses of P prompts under S settings.

    Attributes
    ----------
    losses : ndarray of float64, [P, S]
        In the order of prompts and settings.
    kept : ndarray of float64, [P, S]
        Share of the prompt's cache bytes that each setting keeps.
    lengths : ndarray of int64, [P]
        Tokens of the prompts.
    """

    losses: npt.NDArray[np.float64]
    kept: npt.NDArray[np.float64]
    lengths: npt.NDArray[np.int64]

    @cached_property
    def costs(self) -> npt.NDArray[np.float64]:
        """Mean share of the bytes kept, over all prompts, [S]."""
        return self.kept.mean(axis=0)


def missing(
    prompts: Sequence[OwnPrompt], candidates: Sequence[Candidate], known: Iterable[Loss]
) -> list[tuple[OwnPrompt, list[Candidate]]]:
    """What is left to measure; a prompt that is there twice is measured once."""
    done = {each.key for each in known}
    left = []
    for prompt in {each.digest: each for each in prompts}.values():
        todo = [each for each in candidates if (prompt.digest, each.digest) not in done]
        if todo:
            left.append((prompt, todo))
    return left


def loss_table(
    prompts: Sequence[OwnPrompt], candidates: Sequence[Candidate], known: Iterable[Loss]
) -> LossTable:
    """Put measured losses in order; every pair must have been measured."""
    by_key = {each.key: each for each in known}
    rows = [[by_key[p.digest, c.digest] for c in candidates] for p in prompts]
    return LossTable(
        losses=np.array([[each.loss for each in row] for row in rows]),
        kept=np.array([[each.kept for each in row] for row in rows]),
        lengths=np.array([row[0].prompt_tokens for row in rows]),
    )

"""Somebody's own prompts: one JSON object per line.

    {"prompt": "..."}
    {"context": "...", "question": "...", "answer_prefix": "...", "answers": ["..."]}

`answer_prefix`, `answers` and `metric` may be left out, in either form.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvcompress.errors import ConfigError, config_error, did_you_mean
from vllm_kvcompress.evaluation.quality.metrics import METRICS, check_packages
from vllm_kvcompress.evaluation.quality.sample import Sample
from vllm_kvcompress.evaluation.text_files import check_text, json_lines

_FIELDS = ("prompt", "context", "question", "answer_prefix", "answers", "metric")
_METRIC = "all_in"
_ALLOWED = [name for name in METRICS if name != "classification"]  # it needs a list of classes


@dataclass(frozen=True)
class OwnPrompt:
    """One line of the file.

    Attributes
    ----------
    place : str
        File and line, for messages.
    sample : Sample
        What is read and asked; without `answers` where only agreement can be measured.
    digest : str
        Of all that decides its losses, so that lines may be added or moved between runs.
    """

    place: str
    sample: Sample
    digest: str


def read_prompts(path: Path, needs_answers: bool, max_tokens: int) -> list[OwnPrompt]:
    """All prompts of a file; empty lines are skipped.

    Parameters
    ----------
    needs_answers : bool
        Whether every line must have right answers.
    max_tokens : int
        Most tokens of an answer.

    Raises
    ------
    ConfigError
        If the file cannot be read, holds nothing, or a line is no prompt: one sentence with file
        and line.
    """
    found = [
        _parse(fields, f"{path}:{number}", needs_answers, max_tokens)
        for number, fields in json_lines(path)
    ]
    if not found:
        raise ConfigError(f"--prompts: {path} holds no prompt.")
    if needs_answers:
        check_packages({each.sample.metric for each in found})
    return found


def _parse(fields: Any, place: str, needs_answers: bool, max_tokens: int) -> OwnPrompt:
    if not isinstance(fields, dict):
        raise config_error(place, "", "expected a JSON object with prompt, or context and question")
    for name in fields:
        if name not in _FIELDS:
            hint = did_you_mean(name, list(_FIELDS))
            rule = f"unknown field {{got}}{hint}; allowed are {', '.join(_FIELDS)}"
            raise config_error(place, "", rule, name)
    context, question = _text(fields, place)
    answers = _answers(fields, place, needs_answers)
    metric = fields.get("metric", _METRIC)
    if metric not in _ALLOWED:
        hint = did_you_mean(metric, _ALLOWED) if isinstance(metric, str) else ""
        rule = f"there is no metric {{got}}{hint}; allowed are {', '.join(_ALLOWED)}"
        raise config_error(place, "metric", rule, metric)
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
    sample = Sample(
        name=digest,
        task="own",
        context=context,
        question=question,
        answers=answers,
        metric=metric,
        max_tokens=max_tokens,
        answer_prefix=_string(fields, "answer_prefix", place) if "answer_prefix" in fields else "",
    )
    return OwnPrompt(place, sample, digest)


def _text(fields: dict[str, Any], place: str) -> tuple[str, str]:
    """Context and question; a whole prompt is a context without a question."""
    if "prompt" in fields:
        for name in ("context", "question"):
            if name in fields:
                rule = f"prompt and {name} exclude each other; give prompt, or context and question"
                raise config_error(place, "", rule)
        return _nonempty(fields, "prompt", place), ""
    for name in ("context", "question"):
        if name not in fields:
            raise config_error(place, "", f"has no {name}; give prompt, or context and question")
    return _nonempty(fields, "context", place), _string(fields, "question", place)


def _string(fields: dict[str, Any], name: str, place: str) -> str:
    if not isinstance(fields[name], str):
        raise config_error(place, name, "must be text", fields[name])
    check_text(fields[name], place, name, may_be_empty=True)
    return fields[name]


def _nonempty(fields: dict[str, Any], name: str, place: str) -> str:
    text = _string(fields, name, place)
    if not text.strip():
        raise config_error(place, name, "must not be empty")
    return text


def _answers(fields: dict[str, Any], place: str, needed: bool) -> tuple[str, ...]:
    if "answers" not in fields:
        if needed:
            rule = "has no answers, which --measure answers needs; use --measure agreement"
            raise config_error(place, "", rule)
        if "metric" in fields:
            raise config_error(place, "metric", "means nothing without answers")
        return ()
    answers = fields["answers"]
    right = isinstance(answers, list) and answers
    if not right or not all(isinstance(each, str) and each.strip() for each in answers):
        raise config_error(place, "answers", "must be a list of texts, none empty", answers)
    for each in answers:
        check_text(each, place, "answers")
    return tuple(answers)

"""Samples of LongBench and LongBench-v2 from a local folder.

LongBench: Bai et al., arXiv 2308.14508; v2: Bai et al., arXiv 2412.15204; both
github.com/THUDM/LongBench. Field names, the metric of a dataset and the length of its answers are
theirs. The prompts are our own, so scores differ a little from published ones; the published
prompts are used where the folder holds ``dataset2prompt.json`` (and lengths of answers where it
holds ``dataset2maxlen.json``), also in its subfolder ``config``.
"""

import hashlib
import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from vllm_kvcompress.errors import config_error, did_you_mean
from vllm_kvcompress.evaluation.quality.metrics import METRICS
from vllm_kvcompress.evaluation.quality.sample import Sample
from vllm_kvcompress.evaluation.text_files import (
    check_text,
    decode_utf8,
    json_lines,
    read_bytes,
)

V2 = "longbench_v2"
"""Task name of LongBench-v2's samples, and its key in the two configuration files."""


class _Dataset(NamedTuple):
    """How one dataset is asked and judged."""

    prompt: str  # with fields of the row in braces, {context} once
    metric: str
    max_tokens: int


_ANSWER = "{context}\n\nQuestion: {input}\n"
_QA = (
    "Somebody will ask you about this text.\n\n" + _ANSWER + "Reply with the bare answer, a few "
    "words at most, taken from the text.\nAnswer:"
)
_PAPER = (
    "Somebody will ask you about this paper.\n\n" + _ANSWER + "Reply with the bare answer, one "
    'sentence at most. Where yes or no is asked for, reply "yes" or "no". Where the paper does '
    'not tell, reply "unanswerable".\nAnswer:'
)
_QA_ZH = (
    "有人会就这份材料向你提问。\n\n{context}\n\n问题：{input}\n用最少的字作答，不加解释。\n答："
)
_LONG_QA_ZH = "有人会就这些材料向你提问。\n\n{context}\n\n问题：{input}\n根据材料作答。\n答："
_REPORT = (
    "This is a government report.\n\n{context}\n\nSum up its main points for a busy reader, in "
    "about a page of plain text.\nSummary:"
)
_NEWS = (
    "These are news stories about one event.\n\n{context}\n\nSum up what they tell together, in "
    "about a page of plain text.\nSummary:"
)
_MEETING = (
    "This is what was said in a meeting.\n\n{context}\n\nReply to this request about the meeting "
    "in a few sentences: {input}\nReply:"
)
_MEETING_ZH = "以下是会议发言。\n\n{context}\n\n把这次会议的要点写成一段摘要。\n摘要："
_SHOTS = (
    "Some solved examples come first, then one that you solve the same way. Write only what is "
    "missing at its end.\n\n{context}\n\n{input}"
)
_SHOTS_ZH = "先是几个做好的例子，最后一个请照样完成，只写缺少的部分。\n\n{context}\n\n{input}"
_COUNT = (
    "Some of these paragraphs occur more than once.\n\n{context}\n\nHow many different paragraphs "
    "are there, each counted once? Reply with the number alone.\nNumber:"
)
_RETRIEVAL = (
    "These paragraphs have numbers.\n\n{context}\n\nOne of them was summed up like this:\n\n"
    '{input}\n\nWhich one? Reply in the form "Paragraph N".\nReply:'
)
_RETRIEVAL_ZH = (
    "这些段落都有编号。\n\n{context}\n\n其中一段被概括成：\n\n{input}\n\n是哪一段？"
    "按“段落N”的形式回答。\n答："
)
_CODE = (
    "This code breaks off. Write its next line and nothing else.\n\n{context}{input}\n\n"
    "Next line:\n"
)
_CHOICE = (
    "Somebody will ask you about this text.\n\n{context}\n\nQuestion: {question}\n"
    "(A) {choice_A}\n(B) {choice_B}\n(C) {choice_C}\n(D) {choice_D}\n\nOne option is right. Reply "
    'with this sentence and put its letter for X: "The correct answer is (X)".'
)

_KNOWN = {
    "narrativeqa": _Dataset(_QA, "qa_f1", 128),
    "qasper": _Dataset(_PAPER, "qa_f1", 128),
    "multifieldqa_en": _Dataset(_QA, "qa_f1", 64),
    "multifieldqa_zh": _Dataset(_QA_ZH, "qa_f1_zh", 64),
    "hotpotqa": _Dataset(_QA, "qa_f1", 32),
    "2wikimqa": _Dataset(_QA, "qa_f1", 32),
    "musique": _Dataset(_QA, "qa_f1", 32),
    "dureader": _Dataset(_LONG_QA_ZH, "rouge_l_zh", 128),
    "gov_report": _Dataset(_REPORT, "rouge_l", 512),
    "qmsum": _Dataset(_MEETING, "rouge_l", 512),
    "multi_news": _Dataset(_NEWS, "rouge_l", 512),
    "vcsum": _Dataset(_MEETING_ZH, "rouge_l_zh", 512),
    "trec": _Dataset(_SHOTS, "classification", 64),
    "triviaqa": _Dataset(_SHOTS, "qa_f1_first_line", 32),
    "samsum": _Dataset(_SHOTS, "rouge_l_first_line", 128),
    "lsht": _Dataset(_SHOTS_ZH, "classification", 64),
    "passage_count": _Dataset(_COUNT, "count", 32),
    "passage_retrieval_en": _Dataset(_RETRIEVAL, "retrieval", 32),
    "passage_retrieval_zh": _Dataset(_RETRIEVAL_ZH, "retrieval", 32),
    "lcc": _Dataset(_CODE, "edit_similarity", 64),
    "repobench-p": _Dataset(_CODE, "edit_similarity", 64),
    V2: _Dataset(_CHOICE, "choice", 128),
}
_UNKNOWN = _Dataset(_QA, "", 128)  # the row names its metric itself

_PROMPTS, _LENGTHS = "dataset2prompt.json", "dataset2maxlen.json"


def longbench_samples(folder: Path, count: int | None, seed: int) -> list[Sample]:
    """Samples of every dataset file in a folder, or in its subfolder ``data``.

    Files are ``DATASET.jsonl`` (LongBench, ``DATASET_e.jsonl`` for LongBench-E) and lists of
    LongBench-v2 samples in ``.json`` or ``.jsonl``. A dataset we do not know is taken if its rows
    have a field ``metric``; that field also overrules the metric of one we know.

    Parameters
    ----------
    folder : Path
        As downloaded.
    count : int or None
        Samples per dataset, drawn by their ids: a larger count adds to those of a smaller one.
        None, or more than there are: all.
    seed : int
        Of the draw.

    Raises
    ------
    ConfigError
        If there are no samples or a file has a fault anywhere; the sentence names file, line and
        field.
    """
    if not folder.is_dir():
        raise config_error(str(folder), "", "there is no such folder")
    datasets = _with_published(folder)
    draws: dict[str, _Draw] = {}
    for path in _files(folder):
        for where, row in _rows(path):
            sample = _sample(row, where, path.stem, datasets)
            if sample.task not in draws:
                draws[sample.task] = _Draw(sample.task, count, seed)
            draws[sample.task].offer(sample, where)
    if not draws:
        rule = (
            "holds no samples: allowed are LongBench's DATASET.jsonl, also in a subfolder data, "
            "and LongBench-v2's list in .json or .jsonl"
        )
        raise config_error(str(folder), "", rule)
    return [sample for draw in draws.values() for sample in draw.chosen()]


def middle_cut(token_ids: list[int], limit: int) -> list[int]:
    """Shorten a prompt as LongBench does: keep as much of the beginning as of the end.

    Of an odd limit the beginning gets one token more; LongBench keeps one token less.

    Parameters
    ----------
    token_ids : list of int
    limit : int
        Most tokens of the result, at least 1.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if len(token_ids) <= limit:
        return list(token_ids)
    end = limit // 2
    return token_ids[: limit - end] + token_ids[len(token_ids) - end :]


class _Draw:
    """The samples of one task with the smallest hashes, without holding the others in memory."""

    def __init__(self, task: str, count: int | None, seed: int) -> None:
        self._begin, self._count = f"{seed}/{task}/", count
        self._heap: list[tuple[int, int, Sample]] = []  # negative hash, order of arrival
        self._lines: dict[str, str] = {}

    def offer(self, sample: Sample, where: str) -> None:
        if sample.name in self._lines:
            rule = f"ids must differ, got {{got}} as in {self._lines[sample.name]}"
            raise config_error(where, "_id", rule, sample.name)
        digest = hashlib.sha256((self._begin + sample.name).encode()).digest()
        entry = -int.from_bytes(digest), len(self._lines), sample
        self._lines[sample.name] = where
        if self._count is None or len(self._heap) < self._count:
            heapq.heappush(self._heap, entry)
        elif self._heap:
            heapq.heappushpop(self._heap, entry)

    def chosen(self) -> list[Sample]:
        """In the order of the files."""
        return [sample for _, _, sample in sorted(self._heap, key=lambda entry: entry[1])]


def _files(folder: Path) -> list[Path]:
    """Files that may hold samples, in the folder and in its subfolder ``data``."""
    places = (folder, folder / "data")
    found = [path for place in places for path in place.glob("*.json*")]
    return sorted(
        path
        for path in found
        if path.suffix in (".json", ".jsonl") and path.name not in (_PROMPTS, _LENGTHS)
    )


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a row stands, for error messages, and the row.

    A .json file with an object is settings of something else and holds none.
    """
    if path.suffix == ".jsonl":
        found = ((f"{path}:{number}", row) for number, row in json_lines(path))
    else:
        rows = _json_file(path)
        if isinstance(rows, dict):
            return
        if not isinstance(rows, list):
            raise config_error(str(path), "", "allowed is a list of samples", rows)
        found = ((f"{path}: sample {number}", row) for number, row in enumerate(rows, start=1))
    for where, row in found:
        if not isinstance(row, dict):
            raise config_error(where, "", "allowed is an object with a sample's fields", row)
        yield where, row


def _json_file(path: Path) -> Any:
    text = decode_utf8(read_bytes(path), str(path))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise config_error(f"{path}:{error.lineno}", "", f"not valid JSON ({error})") from None
    except (ValueError, RecursionError) as error:
        raise config_error(str(path), "", f"not valid JSON ({error})") from None


def _sample(row: dict[str, Any], where: str, stem: str, datasets: dict[str, _Dataset]) -> Sample:
    is_v2 = "input" not in row and ("question" in row or "choice_A" in row)
    task = V2 if is_v2 else _task(row, where, stem)
    dataset = _dataset(task, row, where, datasets)
    answers = _letter(row, where) if is_v2 else _texts(row, where, "answers")
    choices = _texts(row, where, "all_classes") if dataset.metric == "classification" else ()
    given = ("context", "question", *(f"choice_{letter}" for letter in "ABCD"))
    for field in given if is_v2 else given[:1]:
        check_text(row.get(field), where, field)
    if not is_v2:
        check_text(row.get("input"), where, "input", may_be_empty=True)  # summaries ask nothing
    begin, end = _fill(dataset.prompt, row, where)
    return Sample(
        name=_name(row, where),
        task=task,
        context=begin,
        question=end,
        answers=answers,
        metric=dataset.metric,
        max_tokens=dataset.max_tokens,
        choices=choices,
    )


def _task(row: dict[str, Any], where: str, stem: str) -> str:
    """The dataset's name, with "_e" for LongBench-E, whose rows do not tell."""
    name = row.get("dataset", stem)
    check_text(name, where, "dataset")
    return stem if stem == f"{name}_e" else name


def _dataset(task: str, row: dict[str, Any], where: str, datasets: dict[str, _Dataset]) -> _Dataset:
    known = datasets.get(task) or datasets.get(task.removesuffix("_e"), _UNKNOWN)
    metric = row.get("metric") or known.metric
    if not metric:
        names = [name for name in _KNOWN if name != V2]
        rule = (
            f"unknown dataset {{got}}{did_you_mean(task, names)}; known are {', '.join(names)}; "
            "others need a field metric"
        )
        raise config_error(where, "dataset", rule, task)
    if not isinstance(metric, str) or metric not in METRICS:
        raise config_error(where, "metric", f"allowed are {', '.join(METRICS)}", metric)
    return known._replace(metric=metric)


def _texts(row: dict[str, Any], where: str, field: str) -> tuple[str, ...]:
    """The texts of a list without empty ones, which every answer would hold."""
    value = row.get(field)
    if not isinstance(value, list):
        raise config_error(where, field, "allowed is a list of texts", value)
    for each in value:
        check_text(each, where, field, may_be_empty=True)
    texts = tuple(each for each in value if each.strip())
    if not texts:
        raise config_error(where, field, "at least one text must not be empty", value)
    return texts


def _letter(row: dict[str, Any], where: str) -> tuple[str]:
    letter = row.get("answer")
    if letter not in ("A", "B", "C", "D"):
        raise config_error(where, "answer", "allowed are A, B, C and D", letter)
    return (letter,)


def _name(row: dict[str, Any], where: str) -> str:
    """The row's id, else its place: samples need names that stay the same."""
    if row.get("_id") is None:
        return Path(where).name
    check_text(row["_id"], where, "_id")
    return row["_id"]


def _fill(prompt: str, row: dict[str, Any], where: str) -> tuple[str, str]:
    """The prompt up to the end of its {context}, and the rest."""
    parts = [""]
    for literal, field, _, _ in Formatter().parse(prompt):
        parts[-1] += literal
        if field is not None:
            value = row.get(field)
            if not isinstance(value, str):
                raise config_error(
                    where, field, "the prompt has this field, so it must be a text", value
                )
            parts[-1] += value
        if field == "context":
            parts.append("")
    return parts[0], parts[1]


def _with_published(folder: Path) -> dict[str, _Dataset]:
    """What we know of datasets, with prompts and lengths of answers from the folder's files."""
    datasets = dict(_KNOWN)
    for name, prompt, where in _settings(folder, _PROMPTS):
        _check_prompt(prompt, where, name)
        datasets[name] = datasets.get(name, _UNKNOWN)._replace(prompt=prompt)
    for name, length, where in _settings(folder, _LENGTHS):
        if type(length) is not int or length < 1:
            raise config_error(where, name, "allowed is a number of tokens of at least 1", length)
        datasets[name] = datasets.get(name, _UNKNOWN)._replace(max_tokens=length)
    return datasets


def _settings(folder: Path, file: str) -> Iterator[tuple[str, Any, str]]:
    """Datasets, values and the file's path; nothing if there is no such file."""
    for path in (folder / file, folder / "config" / file):
        if path.is_file():
            found = _json_file(path)
            if not isinstance(found, dict):
                raise config_error(str(path), "", "allowed is an object of datasets", found)
            yield from ((name, value, str(path)) for name, value in found.items())
            return


def _check_prompt(prompt: Any, where: str, name: str) -> None:
    check_text(prompt, where, name)
    try:
        pieces = list(Formatter().parse(prompt))
    except ValueError as error:
        raise config_error(where, name, f"not a prompt with fields in braces ({error})") from None
    fields = [field for _, field, _, _ in pieces if field is not None]
    if fields.count("context") != 1:
        raise config_error(where, name, "a prompt needs the field {context} once", prompt)
    if any(spec or conversion for _, _, spec, conversion in pieces):
        raise config_error(where, name, "allowed are plain fields such as {input}", prompt)

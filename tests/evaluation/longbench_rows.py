"""Rows of LongBench, right and wrong ones, and files of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality.longbench import longbench_samples

# Metric and answer length of every dataset of LongBench, from its eval.py and dataset2maxlen.json.
PUBLISHED = {
    "narrativeqa": ("qa_f1", 128),
    "qasper": ("qa_f1", 128),
    "multifieldqa_en": ("qa_f1", 64),
    "multifieldqa_zh": ("qa_f1_zh", 64),
    "hotpotqa": ("qa_f1", 32),
    "2wikimqa": ("qa_f1", 32),
    "musique": ("qa_f1", 32),
    "dureader": ("rouge_l_zh", 128),
    "gov_report": ("rouge_l", 512),
    "qmsum": ("rouge_l", 512),
    "multi_news": ("rouge_l", 512),
    "vcsum": ("rouge_l_zh", 512),
    "trec": ("classification", 64),
    "triviaqa": ("qa_f1_first_line", 32),
    "samsum": ("rouge_l_first_line", 128),
    "lsht": ("classification", 64),
    "passage_count": ("count", 32),
    "passage_retrieval_en": ("retrieval", 32),
    "passage_retrieval_zh": ("retrieval", 32),
    "lcc": ("edit_similarity", 64),
    "repobench-p": ("edit_similarity", 64),
}
WITHOUT_INPUT = ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")


def row_of(dataset: str = "hotpotqa", number: int = 0, **changes: Any) -> dict[str, Any]:
    row = {
        "input": "" if dataset in WITHOUT_INPUT else "What {is} asked?",
        "context": "The long {text}.",
        "answers": ["Paragraph 3"],
        "length": 3,
        "dataset": dataset,
        "language": "en",
        "all_classes": ["Paragraph 3", "other"] if dataset in ("trec", "lsht") else None,
        "_id": f"{dataset}-{number}",
    }
    return {**row, **changes}


def v2_row(number: int = 0, **changes: Any) -> dict[str, Any]:
    row = {
        "_id": f"v2-{number}",
        "domain": "Single-Document QA",
        "sub_domain": "Legal",
        "difficulty": "hard",
        "length": "short",
        "question": "Which {one}?",
        "choice_A": "first",
        "choice_B": "second",
        "choice_C": "third",
        "choice_D": "fourth",
        "answer": "C",
        "context": "A contract.",
    }
    return {**row, **changes}


def without(row: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != field}


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def sentence(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        longbench_samples(folder, None, 0)
    found = str(error.value)
    assert "\n" not in found and len(found) <= 400 and found.endswith(".")
    return found

"""How right an answer is, from 0 to 1.

The metrics are those of LongBench (Bai et al., arXiv 2308.14508; github.com/THUDM/LongBench,
metrics.py and eval.py), LongBench-v2 (Bai et al., arXiv 2412.15204; the same repository, pred.py)
and RULER (Hsieh et al., arXiv 2404.06654; github.com/NVIDIA/RULER, scripts/eval/synthetic), so
that scores can be held against published ones. Where we differ on purpose, the function says so.

With several right answers the best one counts, for "all_in" the share of them. An answer of
nothing but white space scores 0.
"""

import importlib
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality.sample import Sample

Metric = Callable[[str, Sample], float]

_PACKAGES = {
    "rouge_l": "rouge",
    "rouge_l_first_line": "rouge",
    "rouge_l_zh": "rouge",
    "edit_similarity": "rapidfuzz",
}


def check_packages(metrics: Iterable[str]) -> None:
    """Make sure that what these metrics need is installed, before hours of answers are made.

    Raises
    ------
    ConfigError
        If a package is missing; the sentence says how to install it.
    """
    for metric in metrics:
        if metric in _PACKAGES:
            _package(metric)


def _package(metric: str) -> Any:
    name = _PACKAGES[metric]
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"{metric}: this metric needs the package {name}: pip install 'vllm-kvcompress[eval]'."
        ) from None


def _best(score: Callable[[str, str], float]) -> Metric:
    """A metric out of a score of one answer against one right answer."""

    def metric(answer: str, sample: Sample) -> float:
        if not answer.strip():
            return 0.0
        return max((score(answer, right) for right in sample.answers), default=0.0)

    return metric


def _of_first_line(score: Callable[[str, str], float]) -> Callable[[str, str], float]:
    """Judge only the first line: models go on with another example after few-shot prompts."""
    return lambda answer, right: score(_first_line(answer), right)


def _first_line(answer: str) -> str:
    """LongBench's rule for trec, triviaqa, samsum and lsht."""
    return answer.lstrip("\n").partition("\n")[0]


def qa_f1(answer: str, right: str) -> float:
    """F1 of words: lower case, without ASCII punctuation and without "a", "an", "the"."""
    return _f1(_words(answer), _words(right))


def qa_f1_zh(answer: str, right: str) -> float:
    """F1 of Chinese characters, without punctuation and signs.

    LongBench splits into words by the package jieba, which we do without: scores are usually
    higher than published ones. As there, a run of Latin letters and digits is one piece.
    """
    return _f1(_plain(_characters(answer.lower())), _plain(_characters(right.lower())))


def _f1(found: Sequence[str], right: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of two bags of tokens."""
    common = (Counter(found) & Counter(right)).total()
    return 2 * common / (len(found) + len(right)) if common else 0.0


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = {"a", "an", "the"}


def _words(text: str) -> list[str]:
    words = re.findall(r"\w+|[^\w\s]+|\s+", text.lower().translate(_NO_PUNCTUATION))
    # Articles go first, then white space splits, so that "«the»word" is two words as published.
    return "".join(" " if word in _ARTICLES else word for word in words).split()


def _characters(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9]+|\S", text)


def _plain(characters: Iterable[str]) -> list[str]:
    return [each for each in characters if unicodedata.category(each[0])[0] not in "PS"]


def rouge_l(answer: str, right: str) -> float:
    """F of ROUGE-L by the package `rouge`, which LongBench uses too.

    It cuts sentences at "." and counts every word once, so it is not quite the ROUGE-L of other
    packages. What it refuses (a text of nothing but ".") scores 0.
    """
    rouge = _package("rouge_l").Rouge(metrics=["rouge-l"], stats=["f"])
    # It walks back through the longest common sequence by recursion, one call per word. LongBench
    # scores 0 where Python's limit ends that; we raise the limit, and never lower it again because
    # another thread may be inside.
    deepest = len(answer.split()) + len(right.split()) + 1000
    sys.setrecursionlimit(max(sys.getrecursionlimit(), deepest))
    try:
        return float(rouge.get_scores(answer, right)[0]["rouge-l"]["f"])
    except ValueError:
        return 0.0


def rouge_l_zh(answer: str, right: str) -> float:
    """ROUGE-L of Chinese characters; LongBench takes jieba's words, as for `qa_f1_zh`."""
    return rouge_l(" ".join(_characters(answer)), " ".join(_characters(right)))


def classification(answer: str, sample: Sample) -> float:
    """1 / number of classes named in the answer's first line, if the right one is among them.

    A named class that is part of the right one's name ("number" in "phone number") does not count.
    Upper and lower case matter. LongBench's code takes such classes out of the list it walks
    through and so skips the one after each; we do not.
    """
    line = _first_line(answer)
    named = {name for name in sample.choices if name and name in line}

    def score(right: str) -> float:
        counted = [name for name in named if name == right or name not in right]
        return 1 / len(counted) if right in counted else 0.0

    return max(map(score, sample.answers), default=0.0)


def edit_similarity(answer: str, right: str) -> float:
    """How alike the first line of code and the right line are: 2 * LCS / (length + length).

    LCS is the longest common sequence of characters. Lines with "`", "#" or "//" are taken for
    comments or marks. LongBench's package rounds to whole percents, which we do not.
    """
    fuzz = importlib.import_module(".fuzz", _package("edit_similarity").__name__)
    for line in answer.lstrip("\n").split("\n"):
        if not any(mark in line for mark in ("`", "#", "//")):
            return float(fuzz.ratio(line, right)) / 100 if line and right else 0.0
    return 0.0


def count(answer: str, right: str) -> float:
    """Share of the numbers in the answer that are the right one, digit by digit."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def retrieval(answer: str, right: str) -> float:
    """Share of the numbers in the answer that are N of the right "Paragraph N" or "段落N".

    All numbers count, whatever stands before them.
    """
    number = re.search(r"(?:Paragraph |段落)(\d+)", right) or re.search(r"(\d+)", right)
    return count(answer, number[1]) if number else 0.0


_CHOICE_PUBLISHED = (
    re.compile(r"The correct answer is \(([A-D])\)"),
    re.compile(r"The correct answer is ([A-D])"),
)
_CHOICE_FORGIVING = (
    # "Answer: B", "the answer is (B)"
    re.compile(r"(?i:\banswer\s*:|\banswer is:?)\s*\(?([A-D])\b"),
    # "B", "(B) because ...", "B. because ...", but not "A dog ..."
    re.compile(r"\A\W*([A-D])(?=[).:,]|\s*$)", re.MULTILINE),
)
_IN_PARENTHESES = re.compile(r"\(([A-D])\)")


def choice_strict(answer: str, sample: Sample) -> float:
    """LongBench-v2's rule: the letter of "The correct answer is (X)", parentheses optional."""
    return float(_choice(answer, sample, _CHOICE_PUBLISHED) in sample.answers)


def choice(answer: str, sample: Sample) -> float:
    """As `choice_strict`; where that finds no letter, one that stands alone or after "answer".

    At last the only letter in parentheses; several different ones score 0.
    """
    letter = _choice(answer, sample, _CHOICE_PUBLISHED + _CHOICE_FORGIVING)
    if letter is None:
        letters = set(_IN_PARENTHESES.findall(answer))
        letter = letters.pop() if len(letters) == 1 else None
    return float(letter in sample.answers)


def _choice(answer: str, sample: Sample, patterns: Iterable[re.Pattern[str]]) -> str | None:
    """The first letter that a pattern finds, the given beginning of the answer included."""
    if not answer.strip():
        return None
    for text in (sample.answer_prefix + answer, answer):
        for pattern in patterns:
            match = pattern.search(text.replace("*", ""))  # bold print
            if match:
                return match[1]
    return None


def prefix(answer: str, right: str) -> float:
    """1 if the answer begins with the right one, without regard to white space."""
    begin = "".join(right.split())
    return float(bool(begin) and "".join(answer.split()).startswith(begin))


def _is_in(answer: str, right: str) -> float:
    return float(right.lower() in answer.lower())


def all_in(answer: str, sample: Sample) -> float:
    """Share of the right answers that are in the answer: RULER's string_match_all."""
    if not answer.strip() or not sample.answers:
        return 0.0
    return sum(_is_in(answer, right) for right in sample.answers) / len(sample.answers)


METRICS: dict[str, Metric] = {
    "qa_f1": _best(qa_f1),
    "qa_f1_first_line": _best(_of_first_line(qa_f1)),
    "qa_f1_zh": _best(qa_f1_zh),
    "rouge_l": _best(rouge_l),
    "rouge_l_first_line": _best(_of_first_line(rouge_l)),
    "rouge_l_zh": _best(rouge_l_zh),
    "classification": classification,
    "edit_similarity": _best(edit_similarity),
    "count": _best(count),
    "retrieval": _best(retrieval),
    "choice": choice,
    "choice_strict": choice_strict,
    "prefix": _best(prefix),
    "all_in": all_in,
    "any_in": _best(_is_in),  # RULER's string_match_part
}
"""By the names that `Sample.metric` may have: answer and sample -> score from 0 to 1."""

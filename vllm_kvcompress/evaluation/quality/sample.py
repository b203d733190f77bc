"""One question to a model: what is read, what is asked, and how the answer is judged."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One long text and a question about it.

    The prompt is ``context + question`` in the model's chat template, then `answer_prefix` as the
    beginning of the model's answer.

    Attributes
    ----------
    name : str
        Names the sample within its task; the same seed gives the same names.
    task : str
        Such as "niah_single" or "hotpotqa"; results are grouped by it.
    context : str
        The long text. Under the protocol "hidden" only this is compressed.
    question : str
        What follows the text; under the protocol "hidden" it comes after the compression.
    answers : tuple[str, ...]
        Right answers; what several mean, says the metric. Empty where the text itself is the
        measure.
    metric : str
        One of `quality.metrics.METRICS`, or "continuation": how well the compressed cache predicts
        `continuation`.
    max_tokens : int
        Most tokens of an answer.
    answer_prefix : str
        How the answer begins, given to the model; "" for none.
    choices : tuple[str, ...]
        All classes of a classification task.
    continuation : str
        The text that follows `context`, for the metric "continuation".
    length : int
        Tokens that were asked for, for tasks that are made to a length; 0 for others.
    depth : float or None
        Where the (first) needle is, 0 to 1; None where that means nothing.
    """

    name: str
    task: str
    context: str
    question: str
    answers: tuple[str, ...]
    metric: str
    max_tokens: int
    answer_prefix: str = ""
    choices: tuple[str, ...] = ()
    continuation: str = ""
    length: int = 0
    depth: float | None = None

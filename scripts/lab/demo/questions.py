"""The model that is asked, and what it is asked."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lab import smollm2
from lab.errors import RunError
from lab.places import PROBE_MODEL
from lab.servers import progress
from vllm_kvcompress.evaluation.quality.plan import TaskOptions, make_plan
from vllm_kvcompress.evaluation.quality.prompts import Prompter
from vllm_kvcompress.evaluation.tasks.needle import make_samples


@dataclass(frozen=True)
class Question:
    """One request.

    Parameters
    ----------
    endpoint : str
        "completions" or "chat".
    prompt : str or list[int]
        Text, or token ids where the answer's beginning follows a chat template.
    answer : str
        The hidden number.
    depth : float
        Where it is hidden, 0 to 1.
    """

    endpoint: str
    prompt: str | list[int]
    answer: str
    depth: float


def endpoint_of(number: int) -> str:
    """Endpoints take turns in pairs: both get every second sample and its neighbour."""
    return ("completions", "chat")[number % 4 in (1, 2)]


def probe_questions(args: argparse.Namespace, tokenize: Callable[[str], Any]) -> list[Question]:
    """What the probe model was trained on; noise and English take turns as the filler."""
    samples = make_samples(args.questions, args.prompt_tokens, tokenize, args.seed)
    return [
        Question(endpoint_of(number), each.prompt, each.answer, each.depth)
        for number, each in enumerate(samples)
    ]


def chat_questions(args: argparse.Namespace) -> list[Question]:
    """Needles of `kvcompress eval`: a chat message, or a completion of the answer's beginning."""
    from transformers import AutoTokenizer

    prompter = Prompter(AutoTokenizer.from_pretrained(args.model))
    options = TaskOptions((args.prompt_tokens,), args.questions, 5, 0, args.seed)
    questions = []
    for number, planned in enumerate(make_plan(["niah"], options, prompter)):
        sample, endpoint = planned.make(), endpoint_of(number)
        chat = sample.context + sample.question
        prompt = chat if endpoint == "chat" else prompter.of(sample).token_ids
        questions.append(Question(endpoint, prompt, sample.answers[0], sample.depth or 0.0))
    return questions


def choose_model(name: str | None, console: Console) -> tuple[str, bool]:
    """Folder of the model, and whether it is the probe model.

    Without a name: SmolLM2, or the probe model where SmolLM2 cannot be had, and says so.
    """
    if name is not None and name not in ("probe", "smollm2"):
        return name, Path(name).resolve() == PROBE_MODEL.resolve()
    if name != "probe":
        with progress(console) as show:
            start = time.monotonic()
            try:
                return str(smollm2.fetch(say=lambda step: show(_since(start), step))), False
            except smollm2.FetchError as error:
                if name == "smollm2":
                    raise RunError(str(error)) from None
                print(f"{smollm2.NAME} cannot be had here: {error} The probe model serves.")
    return str(PROBE_MODEL), True


def _since(start: float) -> float:
    return time.monotonic() - start

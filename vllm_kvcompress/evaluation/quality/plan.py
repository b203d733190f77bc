"""Which samples a run asks: `--tasks`, `--lengths` and `--samples` as one list."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality.generated import FAMILIES, GROUPS, generated_sample
from vllm_kvcompress.evaluation.quality.longbench import longbench_samples
from vllm_kvcompress.evaluation.quality.metrics import check_packages
from vllm_kvcompress.evaluation.quality.own_text import text_samples
from vllm_kvcompress.evaluation.quality.prompts import Prompter
from vllm_kvcompress.evaluation.quality.sample import Sample


@dataclass(frozen=True)
class TaskOptions:
    """How many samples of which size.

    Attributes
    ----------
    lengths : tuple[int, ...]
        Tokens of generated prompts and of the contexts cut from own texts.
    num_samples : int
        Per task and length; per dataset of LongBench.
    num_depths : int
        Places of a needle, evenly spread.
    continuation : int
        Tokens of own texts that are predicted.
    seed : int
        Another seed gives other samples.
    """

    lengths: tuple[int, ...]
    num_samples: int
    num_depths: int
    continuation: int
    seed: int


@dataclass(frozen=True)
class Planned:
    """One sample that is made when its turn comes.

    Attributes
    ----------
    task, name : str
        As in the sample.
    make : callable
        Makes it.
    """

    task: str
    name: str
    make: Callable[[], Sample]


def make_plan(tasks: Sequence[str], options: TaskOptions, prompter: Prompter) -> list[Planned]:
    """All samples, those of all tasks and lengths in turns, so that a part of a run is of use.

    Parameters
    ----------
    tasks : sequence of str
        ``niah``, ``ruler``, a family's name, ``longbench:DIR`` or ``text:FILE[:FILE...]``.

    Raises
    ------
    ConfigError
        If a task is unknown, or its files cannot be read.
    """
    rows: list[list[Planned]] = []
    for task in tasks:
        kind, _, where = task.partition(":")
        if task in GROUPS or task in FAMILIES:
            for family in GROUPS.get(task, (task,)):
                for length in options.lengths:
                    rows.append(list(_generated(family, length, options, prompter)))
        elif kind == "longbench" and where:
            found = longbench_samples(Path(where), options.num_samples, options.seed)
            check_packages(sample.metric for sample in found)
            rows += _by_task(found)
        elif kind == "text" and where:
            rows += _texts([Path(part) for part in where.split(":")], options, prompter)
        else:
            raise ConfigError(
                f"--tasks: there is no task {task!r}; allowed are {', '.join(GROUPS)}, "
                f"{', '.join(FAMILIES)}, longbench:DIR and text:FILE[:FILE...]."
            )
    return _distinct(_in_turns(rows))


def _generated(
    family: str, length: int, options: TaskOptions, prompter: Prompter
) -> Iterator[Planned]:
    for index in range(options.num_samples):

        def make(index: int = index) -> Sample:
            given = family, length, index, options.num_depths, options.seed
            try:
                return generated_sample(*given, prompter.words, prompter.count, prompter.tokens)
            except ValueError as error:
                raise ConfigError(f"--lengths: {family} of {length} tokens: {error}.") from None

        yield Planned(family, f"{length}-{index}", make)


def _by_task(samples: Sequence[Sample]) -> list[list[Planned]]:
    found: dict[str, list[Planned]] = {}
    for sample in samples:
        found.setdefault(sample.task, []).append(
            Planned(sample.task, sample.name, lambda sample=sample: sample)  # type: ignore[misc]
        )
    return list(found.values())


def _texts(paths: list[Path], options: TaskOptions, prompter: Prompter) -> list[list[Planned]]:
    found = []
    for length in options.lengths:
        samples = text_samples(
            paths, prompter.continuation, prompter.text, length, options.continuation,
            options.num_samples, options.seed,
        )  # fmt: skip
        found += _by_task(samples)
    return found


def _in_turns(rows: Sequence[Sequence[Planned]]) -> Iterator[Planned]:
    for index in range(max(map(len, rows), default=0)):
        for row in rows:
            if index < len(row):
                yield row[index]


def _distinct(planned: Iterator[Planned]) -> list[Planned]:
    """Each sample once, though two of the tasks may name it."""
    return list({(each.task, each.name): each for each in planned}.values())

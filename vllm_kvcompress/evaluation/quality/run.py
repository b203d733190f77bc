"""Measures what is planned and not measured yet, sample by sample."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality.plan import Planned
from vllm_kvcompress.evaluation.quality.records import Record, RecordFolder
from vllm_kvcompress.evaluation.quality.sample import Sample
from vllm_kvcompress.evaluation.quality.variants import Variant


class Runner(Protocol):
    """Answers samples."""

    def measure(
        self, sample: Sample, protocol: str, variants: Sequence[Variant]
    ) -> Iterable[Record]:
        """Records of one sample, one per variant; ConfigError if it cannot be answered."""

    def uncompressed(self) -> dict[str, int]:
        """Requests that were served uncompressed though a policy was asked for, by reason."""


class Stopped(Exception):
    """Nothing more can be measured; what was measured is on disk."""


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes
    ----------
    num_records, num_failures : int
        Records added, and samples that could not be measured.
    """

    num_records: int
    num_failures: int


def run(
    runner: Runner,
    planned: Sequence[Planned],
    variants: Sequence[Variant],
    protocols: Sequence[str],
    folder: RecordFolder,
    known: Iterable[Record],
    track: Callable[[Sequence[Planned]], Iterable[Planned]],
) -> Outcome:
    """Measure what is missing.

    Parameters
    ----------
    runner : Runner
        Answers samples.
    planned, variants, protocols : sequences
        Every combination is measured once.
    folder : RecordFolder
        Where records go, all of a sample at once.
    known : iterable of Record
        What it holds already.
    track : callable
        Shows progress over the samples that are left.

    Raises
    ------
    Stopped
        If the runner can answer no more.
    """
    done = {record.key for record in known}
    todo = [each for each in planned if any(_missing(each, variants, protocols, done))]
    num_records = num_failures = 0
    for each in track(todo):
        try:
            sample = each.make()
            for protocol in dict.fromkeys(p for p, _ in _missing(each, variants, protocols, done)):
                left = [v for p, v in _missing(each, variants, protocols, done) if p == protocol]
                records: list[Record] = []
                try:
                    records.extend(runner.measure(sample, protocol, left))
                finally:  # what some settings gave, if others cannot be measured
                    if records:
                        folder.add(records)
                    num_records += len(records)
        except ConfigError as error:
            folder.add_failure(each.task, each.name, str(error))
            num_failures += 1
    return Outcome(num_records, num_failures)


def _missing(
    planned: Planned,
    variants: Sequence[Variant],
    protocols: Sequence[str],
    done: set[tuple[str, str, str, str, float]],
) -> Iterator[tuple[str, Variant]]:
    for protocol in protocols:
        for variant in variants:
            key = planned.task, planned.name, protocol, variant.label, variant.budget
            if key not in done:
                yield protocol, variant

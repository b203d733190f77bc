"""Books of a prompt of 128k tokens: a layer's are covered together, in memory that is set aside.
Extending a book is as well.

A program covers one book, one entry after the other, on one multiprocessor. One book at a time, as
it once was, leaves all others idle for tens of seconds.
"""

import gc
from typing import Any

import pytest

from tests.stand_in import Shape, StandIn, jobs_of, replace_launches
from tests.worker.compaction.memory_watch import MemoryWatch
from tests.worker.compaction.test_working_memory import measured, rank_shape
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.worker.codebook.working_memory import coding_bytes
from vllm_kvcompress.worker.compaction.working_memory import compaction_bytes

LONGEST, NUM_LAYERS, NUM_CODED, NUM_HEADS = 131072, 8, 2, 8


@pytest.fixture
def covered(monkeypatch) -> list[tuple[int, int]]:
    """Books, and vectors of each, of every launch of the cover; nothing runs."""
    found: list[tuple[int, int]] = []

    def launch(kernel: Any, args: tuple, kwargs: dict) -> None:
        if kernel.fn.__name__ == "_cover_kernel":
            found.append(tuple(args[1].shape))  # degrees

    replace_launches(monkeypatch, launch)
    return found


def test_a_layers_books_are_covered_side_by_side(covered: list[tuple[int, int]]) -> None:
    config, shape = parse_config("spindlekv"), Shape(num_layers=NUM_LAYERS)
    assert config is not None
    held = measured(config, shape, [LONGEST])  # twice: into blocks of its own, and in place
    assert min(vectors for _, vectors in covered) > 35_000
    assert min(books for books, _ in covered) >= NUM_HEADS
    assert sum(books for books, _ in covered) == 2 * 2 * NUM_CODED * NUM_HEADS
    said = compaction_bytes(config, rank_shape(shape, LONGEST), [coding_bytes])
    assert held <= said <= 1.3 * held, (held, said)


@pytest.mark.parametrize(
    ("prompt_len", "interval"), [(4096, 128), (4096, 2048), (32768, 128), (32768, 2048)]
)
def test_what_extending_a_book_takes_is_set_aside(
    monkeypatch, prompt_len: int, interval: int
) -> None:
    """The similarity of every new token with every entry is more than a prompt's books take."""
    replace_launches(monkeypatch, lambda *_: None)
    config = parse_config({"preset": "spindlekv", "interval": interval})
    assert config is not None
    shape = Shape(num_layers=NUM_LAYERS)
    model = StandIn(config, shape)
    jobs = jobs_of(model, config, [prompt_len], grown=interval)
    gc.collect()
    with MemoryWatch() as watch:
        model.compactor.run(jobs)
        model.codebooks.writer.take_measures()
    said = compaction_bytes(config, rank_shape(shape, prompt_len + interval), [coding_bytes])
    assert watch.peak <= said, (watch.peak, said)

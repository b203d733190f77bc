"""``kvcompress eval --runner engine``: vLLM itself answers what the replay answers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality.engine_runner import EngineRunner
from vllm_kvcompress.evaluation.quality.generated import generated_sample
from vllm_kvcompress.evaluation.quality.prompts import Prompter
from vllm_kvcompress.evaluation.quality.replay_runner import ReplayRunner
from vllm_kvcompress.evaluation.quality.run import Stopped
from vllm_kvcompress.evaluation.quality.sample import Sample
from vllm_kvcompress.evaluation.quality.variants import Variant

pytestmark = pytest.mark.engine

VARIANTS = [Variant("none"), Variant("keydiff", 0.5), Variant("keydiff", 0.12)]


@pytest.fixture(scope="module")
def prompter(probe_model: str) -> Prompter:
    return Prompter(AutoTokenizer.from_pretrained(probe_model))


@pytest.fixture(scope="module")
def runner(probe_model: str, prompter: Prompter) -> Iterator[EngineRunner]:
    made = EngineRunner(Path(probe_model), prompter, dtype="float32")
    yield made
    made.close()


@pytest.fixture(scope="module")
def samples(prompter: Prompter) -> list[Sample]:
    sizes = prompter.words, prompter.count, prompter.tokens
    return [generated_sample("niah_single", 900, index, 5, 3, *sizes) for index in range(3)]


def test_answers_are_the_replays(probe_model: str, prompter, runner, samples) -> None:
    """Policy by policy, as the command asks: an engine ends before the next one starts."""
    torch.set_num_threads(1)
    replay = ReplayRunner(Path(probe_model), prompter, 32, "cpu")
    expected, found = {}, {}
    for sample in samples:
        expected |= {each.key: each.answer for each in replay.measure(sample, "visible", VARIANTS)}
    for group in (VARIANTS[:1], VARIANTS[1:]):
        for sample in samples:
            found |= {each.key: each.answer for each in runner.measure(sample, "visible", group)}
    assert found == expected
    assert runner.engine.scheduler.stats.requests["keydiff"] == 2 * len(samples)
    assert runner.uncompressed() == {}


def test_what_was_served_uncompressed_is_counted(runner, prompter) -> None:
    """A prompt below `min_prompt_len` is answered, and says nothing about a policy."""
    sample = Sample("1", "t", " ".join(prompter.words[:90]), "\nWhy?", ("x",), "all_in", 4)
    assert len(list(runner.measure(sample, "visible", VARIANTS[1:]))) == 2
    assert runner.uncompressed() == {"short_prompt": 2}
    assert runner.uncompressed() == {"short_prompt": 2}


def test_a_prompt_longer_than_the_server_takes_is_a_failure_of_its_own(runner, prompter) -> None:
    text = " ".join(prompter.words[:400]) * 30
    sample = Sample("1", "t", text, "\nWhy?", ("x",), "all_in", 4, length=9000)
    with pytest.raises(ConfigError, match="the model takes 8192"):
        list(runner.measure(sample, "visible", VARIANTS[1:]))


def test_a_model_that_vllm_does_not_start_with_stops_the_run(probe_model, prompter, runner) -> None:
    """Every further sample would try again for half a minute."""
    runner.close()
    tiny = EngineRunner(Path(probe_model), prompter, kv_cache_memory_bytes=1 << 20)
    sample = Sample("1", "t", "text", "\nWhy?", ("x",), "all_in", 4)
    with pytest.raises(Stopped, match="vLLM does not start with it"):
        list(tiny.measure(sample, "visible", VARIANTS[:1]))

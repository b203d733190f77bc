"""The replay runner: both protocols, continuations, and the command around it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from vllm_kvcompress.cli.main import main
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality.plan import Planned
from vllm_kvcompress.evaluation.quality.prompts import Prompter
from vllm_kvcompress.evaluation.quality.records import RecordFolder, read_records
from vllm_kvcompress.evaluation.quality.replay_runner import ReplayRunner, _batches
from vllm_kvcompress.evaluation.quality.run import Outcome, run
from vllm_kvcompress.evaluation.quality.sample import Sample
from vllm_kvcompress.evaluation.quality.variants import Variant

VARIANTS = [
    Variant("none"),
    Variant("keydiff", 0.5),
    Variant("keydiff", 0.12),
    Variant("windowkv", 0.12),
]


@pytest.fixture(scope="module")
def runner(probe_model: str) -> ReplayRunner:
    torch.set_num_threads(1)
    prompter = Prompter(AutoTokenizer.from_pretrained(probe_model))
    return ReplayRunner(Path(probe_model), prompter, 32, "cpu")


def words(runner: ReplayRunner, count: int, start: int = 0) -> str:
    found = runner.prompter.words
    return " ".join(found[(start + 37 * i) % len(found)] for i in range(count))


def sample_of(runner: ReplayRunner, **fields: Any) -> Sample:
    known = {"answers": ("nothing",), "metric": "all_in", "max_tokens": 6}
    text, question = words(runner, 600), "\nWhat now? " + words(runner, 8, 5)
    return Sample("1", "t", text, question, **{**known, **fields})


def test_visible_answers_are_those_of_the_whole_prompt(runner: ReplayRunner) -> None:
    sample = sample_of(runner)
    found = {r.policy + str(r.budget): r for r in runner.measure(sample, "visible", VARIANTS)}
    assert len(found) == len(VARIANTS)
    prompt = runner.prompter.of(sample)
    prefilled = runner.replay.prefill(prompt.token_ids)
    for variant in VARIANTS[:3]:
        tokens = runner.replay.generate(prefilled, variant.setting(), 6)
        record = found[variant.policy + str(variant.budget)]
        assert record.answer == runner.prompter.text(tokens)
        assert record.prompt_tokens == len(prompt.token_ids)
    assert found["none1.0"].kept == 1 and found["keydiff0.12"].kept < found["keydiff0.5"].kept < 0.6


def test_hidden_questions_are_read_over_the_compressed_text(runner: ReplayRunner) -> None:
    """The reference: the question token by token behind the compressed text."""
    sample = sample_of(runner)
    prompt = runner.prompter.of(sample)
    prefilled = runner.replay.prefill(prompt.context)
    found = {r.budget: r for r in runner.measure(sample, "hidden", VARIANTS[:3])}
    for variant in VARIANTS[:3]:
        cache = runner.replay.view(prefilled, variant.setting())
        position = len(prompt.context)
        for token in prompt.rest:
            following = runner.replay.next_token(cache, token, position)
            position += 1
        tokens = [following]
        while len(tokens) < 6:
            tokens.append(runner.replay.next_token(cache, tokens[-1], position))
            position += 1
        assert found[variant.budget].answer == runner.prompter.text(tokens)


def test_prompts_that_are_compacted_inside_are_answered_so(
    runner: ReplayRunner, tmp_path: Path
) -> None:
    """Their first token, too, is another one than after the whole prompt."""
    fields = "version: 1\npolicy: {name: keydiff}\nbudget: {ratio: 0.12}\n"
    file = tmp_path / "marks.yaml"
    file.write_text(fields + "trigger: prompt\nprompt_interval: 96\n", encoding="utf-8")
    variants = [Variant("none"), Variant("keydiff", 0.12), Variant(str(file), 0.12)]
    sample = sample_of(runner)
    found = {r.policy: r for r in runner.measure(sample, "visible", variants)}
    prefilled = runner.replay.prefill(runner.prompter.of(sample).token_ids)
    for variant in variants:
        tokens = runner.replay.generate(prefilled, variant.setting(), 6)
        assert found[variant.label].answer == runner.prompter.text(tokens)
    part = runner.replay.under(prefilled, variants[2].setting())
    assert part.held is not None and part.first_token != prefilled.first_token
    assert found["marks"].kept == found["keydiff"].kept


def test_a_short_prompt_is_left_alone_as_the_server_does(runner: ReplayRunner) -> None:
    sample = Sample("1", "t", words(runner, 40), "\nWhy?", ("x",), "all_in", 4)
    found = list(runner.measure(sample, "visible", VARIANTS))
    assert {record.kept for record in found} == {1.0}
    assert len({record.answer for record in found}) == 1


def test_a_continuation_is_measured_against_the_whole_cache(runner: ReplayRunner) -> None:
    text, more = words(runner, 600), " " + words(runner, 20, 11)
    sample = Sample("1", "text", text, "", (), "continuation", 0, continuation=more)
    found = {r.budget: r for r in runner.measure(sample, "visible", VARIANTS[:3])}
    whole = found[1.0]
    assert whole.score == 1 and whole.kl == pytest.approx(0, abs=1e-6)
    # The reference: one pass of the model itself over text and continuation.
    prompt = runner.prompter.of(sample).token_ids
    tokens = runner.prompter.continuation(more)
    logits = runner.replay.model(torch.tensor([prompt + tokens])).logits[0].detach()
    expected = logits[len(prompt) : -1].log_softmax(-1)
    nll = -expected.gather(1, torch.tensor(tokens[1:])[:, None]).mean()
    assert whole.nll == pytest.approx(float(nll), rel=1e-3)
    assert whole.answer_tokens == len(tokens) - 1
    lossy = found[0.12]
    assert 0 <= lossy.score <= 1 and lossy.kl > whole.kl and math.isfinite(lossy.nll)


INTERVALS = [Variant("none"), Variant("rkv", 0.12), Variant("keydiff", 0.12)]


def test_a_continuation_is_compacted_on_its_way(runner: ReplayRunner, tmp_path: Path) -> None:
    """The reference: the model's own cache, cut down by hand to the last tokens and the sinks."""
    file = tmp_path / "recent.yaml"
    fields = "version: 1\npolicy: {name: streaming_llm}\nbudget: {ratio: 0.25}\ntrigger: both\n"
    file.write_text(fields + "interval: 64\nnum_sink_tokens: 4\n", encoding="utf-8")
    more = " " + words(runner, 170, 11)
    sample = Sample("1", "text", words(runner, 600), "", (), "continuation", 0, continuation=more)
    variants = [*INTERVALS, Variant(str(file), 0.25)]
    found = {r.policy: r for r in runner.measure(sample, "visible", variants)}
    assert found["none"].kept == 1 and found["none"].score == 1
    assert 0.12 < found["keydiff"].kept < found["recent"].kept < found["rkv"].kept < 1

    prompt = runner.prompter.of(sample).token_ids
    tokens = [*prompt, *runner.prompter.continuation(more)]
    budget, size = math.ceil(0.25 * len(prompt)), len(tokens)
    seen = torch.ones(size, size, dtype=torch.bool).tril()
    held, shares = torch.arange(0), []
    for mark in range(len(prompt), size, 64):
        held = torch.cat([held, torch.arange(held[-1] + 1 if len(held) else 0, mark)])
        tail = len(held) % 32
        keep = math.ceil((budget - tail) / 32) * 32
        region, behind = held[: len(held) - tail], held[len(held) - tail :]
        held = torch.cat([region[:4], region[len(region) - keep + 4 :], behind])
        lost = torch.ones(mark, dtype=torch.bool)
        lost[held] = False
        seen[mark:, :mark][:, lost] = False
    with runner.replay.masked([seen[None, None]] * len(runner.replay.layers)):
        logits = runner.replay.model(torch.tensor([tokens])).logits[0].detach()
    expected = logits[len(prompt) : -1].log_softmax(-1)
    nll = -expected.gather(1, torch.tensor(tokens[len(prompt) + 1 :])[:, None]).mean()
    assert found["recent"].nll == pytest.approx(float(nll), rel=1e-4)
    assert abs(found["recent"].nll - found["none"].nll) > 0.01
    shares = seen[len(prompt) : -1].sum(1) / torch.arange(len(prompt) + 1, size)
    assert found["recent"].kept == pytest.approx(float(shares.mean()), abs=1e-4)


def test_settings_that_a_sample_cannot_measure_leave_the_others(
    runner: ReplayRunner, tmp_path: Path
) -> None:
    text, more = words(runner, 600), " " + words(runner, 60, 11)
    sample = Sample("1", "text", text, "", (), "continuation", 0, continuation=more)
    folder = RecordFolder(tmp_path)
    planned = [Planned("text", "1", lambda: sample)]
    assert run(runner, planned, INTERVALS, ["visible"], folder, [], list) == Outcome(2, 1)
    assert [r.policy for r in read_records(tmp_path)] == ["none", "keydiff"]
    [failure] = (tmp_path / "failures.jsonl").read_text().splitlines()
    assert "rkv: it compresses only while decoding, every 128 tokens, and" in failure
    long = replace(sample, continuation=" " + words(runner, 170, 11))
    with pytest.raises(ConfigError, match=r"^spindlekv: codebook\.extend: \d+ tokens follow"):
        list(runner.measure(long, "visible", [Variant("spindlekv", 0.5)]))


def test_answers_that_are_compacted_on_their_way(runner: ReplayRunner) -> None:
    sample = sample_of(runner, max_tokens=140)
    for protocol in ("visible", "hidden"):
        found = {r.policy: r for r in runner.measure(sample, protocol, INTERVALS[:2])}
        assert 0.8 < found["rkv"].kept < found["none"].kept == 1
        if protocol == "visible":
            prefilled = runner.replay.prefill(runner.prompter.of(sample).token_ids)
            tokens = runner.replay.generate(prefilled, INTERVALS[1].setting(), 140)
            assert found["rkv"].answer == runner.prompter.text(tokens)


def test_an_answer_that_ends_at_once(runner: ReplayRunner, monkeypatch) -> None:
    """Nothing follows the prompt, so nothing is compacted, either."""
    sample = sample_of(runner, max_tokens=140)
    first = runner.replay.prefill(runner.prompter.of(sample).token_ids).first_token
    monkeypatch.setattr(runner, "stop", frozenset([first]))
    found = {r.policy: r for r in runner.measure(sample, "visible", INTERVALS)}
    assert {r.answer for r in found.values()} == {""}
    assert found["rkv"].kept == 1 and found["keydiff"].kept < 0.3


def test_a_prompt_longer_than_the_model_is_refused(runner: ReplayRunner, monkeypatch) -> None:
    monkeypatch.setattr(runner, "longest", 200)
    sample = sample_of(runner, length=500)
    with pytest.raises(ConfigError, match="the model takes 200"):
        list(runner.measure(sample, "visible", VARIANTS))


def test_a_prompt_larger_than_memory_is_one_sentence(runner: ReplayRunner, monkeypatch) -> None:
    def host(token_ids: list[int]) -> torch.Tensor:
        return torch.empty(1 << 60, dtype=torch.uint8)  # the real error of torch

    def device(token_ids: list[int]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def other(token_ids: list[int]) -> None:
        raise RuntimeError("shapes do not match")

    sample = sample_of(runner)
    for fails in (host, device):
        monkeypatch.setattr(runner.replay, "prefill", fails)
        with pytest.raises(ConfigError, match=r"of \d+ tokens does not fit into the memory of cpu"):
            list(runner.measure(sample, "visible", VARIANTS))
    monkeypatch.setattr(runner.replay, "prefill", other)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(runner.measure(sample, "visible", VARIANTS))


def test_batches_hold_everything_once_and_are_not_too_large() -> None:
    variants = [Variant(name, b) for name in "abcdefgh" for b in (0.5, 0.12)] + [Variant("none")]
    batches = list(_batches(variants, 8000))
    assert sorted(v.label + str(v.budget) for b in batches for v in b) == sorted(
        v.label + str(v.budget) for v in variants
    )
    assert all(max(v.budget for v in b) * 8000 * len(b) <= 16_384 or len(b) == 1 for b in batches)


# --- the command --------------------------------------------------------------------------


def command(probe_model: str, out: Path, *options: str) -> list[str]:
    given = ["--policies", "keydiff,streaming_llm", "--budgets", "0.5,0.12", "--samples", "2"]
    return ["eval", "--model", probe_model, *given, "--lengths", "700", "--out", str(out), *options]


def test_the_command_measures_reports_and_goes_on(probe_model: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "report"
    assert main(command(probe_model, out)) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    first = list(read_records(out))
    assert len(first) == 2 * 5
    assert "niah_single" in (out / "report.html").read_text()
    assert (out / "cells.csv").is_file()
    asked = json.loads((out / "run.json").read_text())
    assert asked["asked"]["runner"] == "replay" and asked["measured_with"]["torch"]
    assert main(command(probe_model, out, "--protocol", "both")) == 0
    again = list(read_records(out))
    assert again[:10] == first and len(again) == 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policies", "nope"], "nope"),
        (["--policies", "rkv"], "rkv compresses only while decoding"),
        (["--tasks", "nope"], "there is no task 'nope'"),
        (["--tasks", "longbench:/nowhere"], "/nowhere"),
        (["--tasks", "text:/nowhere"], "/nowhere"),
        (["--model", "/nowhere"], "--model: /nowhere holds no tokenizer"),
        (["--runner", "engine", "--protocol", "both"], "--protocol: a server compresses whole"),
        (["--url", "http://127.0.0.1:9"], "--url: http://127.0.0.1:9 names no model"),
        (["--url", "http://127.0.0.1:9", "--policies", "a.yaml"], "allowed are none, server"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    probe_model: str, tmp_path: Path, capsys, options: list[str], words: str
) -> None:
    assert main(command(probe_model, tmp_path / "out", *options)) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("kvcompress: error: ") and words in error and "\n" not in error


@pytest.mark.parametrize(
    "options", [["--budgets", "0"], ["--budgets", "x"], ["--lengths", "3"], ["--samples", "0"]]
)
def test_numbers_out_of_range_are_refused(probe_model: str, tmp_path: Path, options) -> None:
    with pytest.raises(SystemExit) as error:
        main(command(probe_model, tmp_path / "out", *options))
    assert error.value.code == 2


def test_another_seed_does_not_go_on_in_the_same_folder(
    probe_model: str, tmp_path: Path, capsys
) -> None:
    options = ["--samples", "1", "--policies", "keydiff", "--budgets", "0.5"]
    assert main(command(probe_model, tmp_path, *options)) == 0
    assert main(command(probe_model, tmp_path, *options, "--seed", "1")) == 1
    assert "holds another run (seed was 0, is 1)" in capsys.readouterr().err


def test_if_all_samples_fail_there_is_no_report(probe_model: str, tmp_path: Path, capsys) -> None:
    assert main(command(probe_model, tmp_path, "--samples", "1", "--lengths", "9000")) == 1
    assert "1 sample could not be measured" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failures.jsonl", "run.json"]


def test_samples_that_fail_are_counted_and_the_report_is_written(
    probe_model: str, tmp_path: Path, capsys
) -> None:
    options = ["--samples", "1", "--lengths", "700,9000", "--policies", "keydiff"]
    assert main(command(probe_model, tmp_path, *options)) == 0
    captured = capsys.readouterr()
    assert "1 sample could not be measured" in captured.err
    assert len(list(read_records(tmp_path))) == 3

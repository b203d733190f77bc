"""Losses against a token-by-token reference, and the command end to end on the probe model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from vllm_kvcompress.cli.main import main
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality.prompts import Prompter
from vllm_kvcompress.evaluation.tuning import measuring
from vllm_kvcompress.evaluation.tuning.grid import Candidate, make_candidates
from vllm_kvcompress.evaluation.tuning.measuring import LossMeter
from vllm_kvcompress.evaluation.tuning.prompts_file import OwnPrompt, read_prompts

NUM_PROMPTS, NUM_TOKENS = 12, 8
CHAINS = ["keydiff-o16", "windowkv"]  # the second depends on the task


@pytest.fixture(scope="module")
def prompter(probe_model: str) -> Prompter:
    torch.set_num_threads(1)
    return Prompter(AutoTokenizer.from_pretrained(probe_model))


@pytest.fixture(scope="module")
def prompts_file(prompter: Prompter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of 520 to 600 tokens."""
    lines = []
    for number in range(NUM_PROMPTS):
        text = " ".join(
            prompter.words[(11 * number + (37 + number) * i) % len(prompter.words)]
            for i in range(540)
        )
        fields = {"context": text, "question": "\nWhat now?", "answers": ["e"]}
        assert prompter.count(text, "\nWhat now?", "") > 520
        lines.append(json.dumps(fields) + "\n")
    path = tmp_path_factory.mktemp("prompts") / "mine.jsonl"
    path.write_text("".join(lines))
    return path


def meter_of(probe_model: str, prompter: Prompter, measure: str = "agreement") -> LossMeter:
    return LossMeter(Path(probe_model), prompter, measure, NUM_TOKENS, 32)


@pytest.fixture(scope="module")
def meter(probe_model: str, prompter: Prompter) -> LossMeter:
    return meter_of(probe_model, prompter)


@pytest.fixture(scope="module")
def prompts(prompts_file: Path) -> list[OwnPrompt]:
    return read_prompts(prompts_file, True, NUM_TOKENS)


CANDIDATES = make_candidates(["keydiff-o16", "snapkv-w7-o16"], [1.0, 0.5, 0.12])


def reference(meter: LossMeter, prompt: OwnPrompt, candidate: Candidate, stop: set[int]) -> float:
    """Agreement token by token, without batches or masks."""
    replay = meter.replay
    prefilled = replay.prefill(meter._ids(prompt))
    said = replay.generate(prefilled, None, NUM_TOKENS + 1)
    end = next((i for i, token in enumerate(said) if token in stop), len(said))
    cache, losses = replay.view(prefilled, candidate.config), []
    for place in range(min(end, NUM_TOKENS)):
        found = replay.next_token(cache, said[place], len(prefilled.token_ids) + place)
        both_end = found in stop and said[place + 1] in stop
        losses.append(not (both_end or found == said[place + 1]))
    return sum(losses) / len(losses) if losses else 0.0


def test_agreement_is_that_of_token_by_token(meter: LossMeter, prompts: list[OwnPrompt]) -> None:
    found = []
    for prompt in prompts[:4]:
        for loss in meter.losses(prompt, CANDIDATES):
            candidate = next(c for c in CANDIDATES if c.digest == loss.setting)
            assert loss.name == candidate.name and loss.prompt == prompt.digest
            assert loss.loss == reference(meter, prompt, candidate, set(meter.runner.stop))
            found.append(loss.loss)
    assert len(found) == 4 * len(CANDIDATES) and len(set(found)) > 2


def test_the_whole_cache_loses_nothing(meter: LossMeter, prompts: list[OwnPrompt]) -> None:
    whole = [each for each in CANDIDATES if each.budget == 1]
    assert [(each.loss, each.kept) for each in meter.losses(prompts[0], whole)] == [(0, 1)] * 2


@pytest.mark.parametrize("place", [0, 1, 4])
def test_an_end_is_a_token_like_others(
    probe_model: str, prompter: Prompter, prompts: list[OwnPrompt], place: int
) -> None:
    """Nothing behind the end of the whole cache's answer counts; ending there does."""
    meter = meter_of(probe_model, prompter)
    said = meter.replay.generate(meter.replay.prefill(meter._ids(prompts[1])), None, NUM_TOKENS)
    meter.runner.stop = frozenset({said[place]})
    stop = set(meter.runner.stop)
    for loss in meter.losses(prompts[1], CANDIDATES):
        candidate = next(c for c in CANDIDATES if c.digest == loss.setting)
        assert loss.loss == reference(meter, prompts[1], candidate, stop)


def test_answers_lose_what_their_score_lacks(
    probe_model: str, prompter: Prompter, prompts: list[OwnPrompt], tmp_path: Path
) -> None:
    meter = meter_of(probe_model, prompter, "answers")
    replay, sample = meter.replay, prompts[0].sample
    prefilled = replay.prefill(meter._ids(prompts[0]))
    candidates = make_candidates(["keydiff-o16", "snapkv-w7-o16"], [0.12, 0.06])
    answers = [replay.generate(prefilled, each.config, NUM_TOKENS) for each in candidates]
    texts = [prompter.text(answer) for answer in answers]
    whole = prompter.text(replay.generate(prefilled, None, NUM_TOKENS))
    right = [whole.split()[0], whole[-6:], "never said"]
    path = tmp_path / "mine.jsonl"
    fields = {"context": sample.context, "question": sample.question, "answers": right}
    path.write_text(json.dumps(fields) + "\n")
    (prompt,) = read_prompts(path, True, NUM_TOKENS)
    found = {each.setting: each.loss for each in meter.losses(prompt, candidates)}

    def score(text: str) -> float:
        return sum(word.lower() in text.lower() for word in right) / 3

    expected = [max(0.0, score(whole) - score(text)) for text in texts]
    assert [found[each.digest] for each in candidates] == pytest.approx(expected)
    assert score(whole) == pytest.approx(2 / 3) and max(expected) > 0


def test_small_batches_change_nothing(
    meter: LossMeter, prompts: list[OwnPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = {each.setting: each.loss for each in meter.losses(prompts[2], CANDIDATES)}
    monkeypatch.setattr(measuring, "_BATCH_LOGITS", 1)
    alone = {each.setting: each.loss for each in meter.losses(prompts[2], CANDIDATES)}
    assert alone == together


def test_prompts_beyond_the_model_are_named(meter: LossMeter, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "word " * 9000}) + "\n")
    with pytest.raises(ConfigError, match=r"mine.jsonl:1: the prompt has \d+ tokens"):
        meter.check(read_prompts(path, False, 8), [])


# --- the command --------------------------------------------------------------------------


def test_tokens_that_only_vllm_would_code_are_refused(meter: LossMeter, monkeypatch) -> None:
    books = make_candidates(["books"], [0.5])[:1]
    monkeypatch.setattr(meter, "num_tokens", books[0].config.interval + 1)
    meter.check([], books)
    monkeypatch.setattr(meter, "num_tokens", books[0].config.interval + 2)
    with pytest.raises(ConfigError, match=r"--policies: \S+: codebook.extend: 129 tokens follow"):
        meter.check([], books)


def command(probe_model: str, prompts_file: Path, out: Path, *options: str) -> list[str]:
    given = ["--model", probe_model, "--prompts", str(prompts_file), "--out", str(out)]
    small = ["--policies", ",".join(CHAINS), "--budgets", "0.5,0.12", "--tokens", str(NUM_TOKENS)]
    return ["tune", *given, *small, *options]


def no_model(*args: object, **options: object) -> None:
    raise AssertionError("the model is loaded though nothing is missing")


def test_a_setting_is_chosen_that_a_server_takes(
    probe_model: str,
    prompts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    asked = command(probe_model, prompts_file, out)
    assert main([*asked, "--target", "0.1"]) == 0
    captured = capsys.readouterr()
    assert "Chosen: " in captured.out and "Held out: " in captured.out
    assert "of 12 prompts 8 are left for the test" in captured.err
    text = (out / "tuned.yaml").read_text()
    for words in (
        "of at least 0.1, at confidence 0.9",
        "Model: probe-model",
        "Held out",
        "Command",
    ):
        assert words in text
    summary = json.loads((out / "summary.json").read_text())
    config = parse_config(str(out / "tuned.yaml"))
    named = {c.name: c.config for c in make_candidates(CHAINS, [0.5, 0.12])}
    assert config == named[summary["chosen"]["name"]]
    assert main(["validate", str(out / "tuned.yaml")]) == 0
    assert len((out / "losses.jsonl").read_text().splitlines()) == NUM_PROMPTS * 4
    assert summary["repetitions"]["splits"] == 20
    parts = summary["split"]
    assert sorted(sum(parts.values(), [])) == list(range(NUM_PROMPTS))

    # The same losses, another target: nothing is measured, and the old setting is gone.
    capsys.readouterr()
    monkeypatch.setattr(measuring, "LossMeter", no_model)
    assert main([*asked, "--target", "0.999"]) == 3
    captured = capsys.readouterr()
    assert "no setting qualifies. Closest is " in captured.err and "Chosen" not in captured.out
    assert not (out / "tuned.yaml").exists()
    assert json.loads((out / "summary.json").read_text())["chosen"] is None

    assert main([*asked, "--target", "0.1", "--test", "betting"]) == 0
    assert "(betting, level 0.05)" in (out / "tuned.yaml").read_text()
    assert json.loads((out / "summary.json").read_text())["test"] == "betting"


def test_a_run_goes_on_where_it_was_cut_off(
    probe_model: str, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = command(probe_model, prompts_file, tmp_path / "out", "--target", "0.1", "--splits", "0")
    measured: list[str] = []
    losses = LossMeter.losses

    def interrupted(self: LossMeter, prompt: OwnPrompt, todo: list[Candidate]) -> list:
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(prompt.digest)
        return losses(self, prompt, todo)

    monkeypatch.setattr(LossMeter, "losses", interrupted)
    assert main(asked) == 1
    path = tmp_path / "out" / "losses.jsonl"
    before = path.read_text().splitlines()
    assert len(before) == 5 * 4
    path.write_text("\n".join(before[:-1]) + "\n" + before[-1][:30])
    measured = measured[:1]
    monkeypatch.setattr(
        LossMeter, "losses", lambda s, p, t: (measured.append(p.digest), losses(s, p, t))[1]
    )
    assert main(asked) == 0
    assert len(measured) == 1 + NUM_PROMPTS - 4  # the fifth lacked one setting
    after = path.read_text().splitlines()
    assert after[:19] == before[:19] and len(after) == NUM_PROMPTS * 4
    last, again = json.loads(before[19]), [json.loads(line) for line in after[19:]]
    same = [
        each
        for each in again
        if (each["prompt"], each["setting"]) == (last["prompt"], last["setting"])
    ]
    assert [each["loss"] for each in same] == [last["loss"]]


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        (4, [], "holds 4 prompts, and screening, test and check take 5 at least"),
        (12, ["--policies", "snapvk"], "did you mean 'snapkv'?"),
        (12, ["--model", "nowhere"], "nowhere holds no tokenizer"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    probe_model: str,
    prompts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lines: int,
    options: list[str],
    words: str,
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(prompts_file.read_text().splitlines(keepends=True)[:lines]))
    asked = command(probe_model, path, tmp_path / "out", "--target", "0.5", *options)
    assert main(asked) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("kvcompress: error: ") and words in error


def test_short_prompts_leave_nothing_to_choose(
    probe_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Hello {i}"}) + "\n" for i in range(6)))
    assert main(command(probe_model, path, tmp_path / "out", "--target", "0.5")) == 1
    assert "no setting frees anything of it" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["0", "1", "1.5", "x"])
def test_targets_that_cannot_be(
    probe_model: str, prompts_file: Path, tmp_path: Path, target: str
) -> None:
    with pytest.raises(SystemExit):
        main(command(probe_model, prompts_file, tmp_path, "--target", target))

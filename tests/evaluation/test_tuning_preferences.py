"""Layer budgets that tune measures on prompts it sets aside, and its chains of codebooks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lab.random_models import write_random_model
from vllm_kvcompress.cli.main import main
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality.prompts import Prompter
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.evaluation.tuning import measuring
from vllm_kvcompress.evaluation.tuning.grid import AUTO, BOOKS, make_candidates
from vllm_kvcompress.evaluation.tuning.preferences import (
    FILE,
    chains,
    known_or_measured,
    layer_shares,
    set_aside,
)
from vllm_kvcompress.evaluation.tuning.prompts_file import OwnPrompt, read_prompts
from vllm_kvcompress.lengths.budgets import group_budgets
from vllm_kvcompress.lengths.codebook import coded_groups

NUM_PROMPTS = 13


@pytest.fixture(scope="module")
def prompts_file(probe_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = Prompter(AutoTokenizer.from_pretrained(probe_model)).words
    path = tmp_path_factory.mktemp("prompts") / "mine.jsonl"
    texts = [
        " ".join(words[(11 * number + (37 + number) * i) % len(words)] for i in range(540))
        for number in range(NUM_PROMPTS)
    ]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def prompts(prompts_file: Path) -> list[OwnPrompt]:
    return read_prompts(prompts_file, False, 8)


def test_prompts_set_aside_depend_on_their_texts_alone(prompts: list[OwnPrompt]) -> None:
    aside, rest = set_aside(prompts)
    assert (len(aside), len(rest)) == (8, NUM_PROMPTS - 8)
    again, others = set_aside([*reversed(prompts), aside[0]])  # one prompt is there twice
    assert [each.digest for each in again] == [each.digest for each in aside]
    assert {each.digest for each in others} == {each.digest for each in rest}


@pytest.mark.parametrize("name", ["probe", "gemma3"])
def test_shares_are_cakes(probe_model: str, tmp_path: Path, name: str) -> None:
    """H times V of the paper, from attention that is computed here, whole and in float64.

    Windowed layers have no share: nothing of them is compressed.
    """
    torch.set_num_threads(1)
    is_probe = name == "probe"
    replay = Replay(probe_model if is_probe else str(write_random_model(tmp_path, name)))
    full = range(4) if is_probe else (1, 3)
    prompts = [list(range(5, 85)), list(range(900, 940)) * 2]
    expected = torch.zeros(len(full), dtype=torch.float64)
    for token_ids in prompts:
        found, each = replay.prefill(token_ids), []
        for number in full:
            layer, queries, keys = replay.layers[number], found.queries[number], found.keys[number]
            per_head = queries.shape[0] // keys.shape[0]
            logits = queries[:, -32:].double() @ keys.double().repeat_interleave(
                per_head, 0
            ).transpose(1, 2)
            places = torch.arange(80)
            hidden = places[None, :] > places[-32:, None]
            logits = (logits * layer.self_attn.scaling).masked_fill(hidden, -torch.inf)
            weights = logits.softmax(-1)
            spread = -torch.special.xlogy(weights, weights).sum(-1).mean()
            each.append(spread * weights.var(dim=1).sum(-1).mean())
        expected += torch.stack(each) / sum(each) / len(prompts)
    assert layer_shares(replay, prompts) == pytest.approx(expected.tolist(), rel=1e-3)


def test_chains_have_the_shares_of_their_layers() -> None:
    found = chains([0.4, 0.2, 0.3, 0.1], AUTO)
    assert list(found) == ["preferences-g2", "preferences-g4"]  # no 8 groups of 4 layers
    assert found["preferences-g2"].layer_budget.preferences == (0.3, 0.2)
    budgets = group_budgets(1000, 500, found["preferences-g4"], 4)
    assert budgets[0] > budgets[2] > budgets[1] > budgets[3]


def fail() -> list[float]:
    raise AssertionError("measured again")


def test_shares_are_measured_once_per_prompts(prompts: list[OwnPrompt], tmp_path: Path) -> None:
    measure: Callable[[], list[float]] = lambda: [0.123456789, 0.5]  # noqa: E731
    assert known_or_measured(tmp_path, prompts, measure) == [0.123457, 0.5]
    assert known_or_measured(tmp_path, prompts, fail) == [0.123457, 0.5]
    assert known_or_measured(tmp_path, prompts[1:], lambda: [1.0]) == [1.0]
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(ConfigError, match=r"preferences.json is no file of kvcompress tune\.$"):
        known_or_measured(tmp_path, prompts, fail)


def test_chains_of_codebooks() -> None:
    found = {each.chain: each.config for each in make_candidates([BOOKS], [0.25])}
    assert len(found) == 12
    quarter = found["books-first-4th-e0.3"]
    assert coded_groups(quarter.codebook, 4) == {0: 0.3}  # type: ignore[arg-type]
    assert coded_groups(found["books-first-3rd-e0.5"].codebook, 3) == {0: 0.5}  # type: ignore[arg-type]
    assert coded_groups(found["books-all-e0.15"].codebook, 1) == {0: 0.15}  # type: ignore[arg-type]


def test_both_are_tried_and_a_run_goes_on(
    probe_model: str,
    prompts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    words = ["tune", "--model", probe_model, "--prompts", str(prompts_file), "--out", str(out)]
    words += ["--policies", "preferences,books-first-4th-e0.3", "--budgets", "0.5", "--tokens", "8"]
    assert main([*words, "--target", "0.05", "--splits", "2"]) == 0
    assert "Layers prefer, on 8 prompts set aside: " in capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    names = {"preferences-g2@0.5", "preferences-g4@0.5", "books-first-4th-e0.3@0.5"}
    assert {line["name"] for line in lines} == names
    assert len(lines) == (NUM_PROMPTS - 8) * 3
    aside = set(json.loads((out / FILE).read_text())["prompts"])
    assert not aside & {line["prompt"] for line in lines}
    coded = [line["kept"] for line in lines if line["name"].startswith("books")]
    plain = [line["kept"] for line in lines if line["name"].startswith("preferences")]
    assert max(coded) < min(plain)  # codes take less than the tokens that they stand for

    monkeypatch.setattr(measuring, "LossMeter", None)  # everything is known
    assert main([*words, "--target", "0.04"]) == 0


def test_prompts_set_aside_are_counted(
    probe_model: str, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(prompts_file.read_text().splitlines(keepends=True)[:11]))
    words = ["tune", "--model", probe_model, "--prompts", str(few), "--target", "0.9"]
    assert main([*words, "--policies", "preferences", "--out", str(tmp_path / "out")]) == 1
    assert "holds 3 prompts beside 8 set aside, and screening" in capsys.readouterr().err

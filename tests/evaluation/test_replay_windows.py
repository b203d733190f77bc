"""Replay of models with windowed layers: answers, bytes kept, survivors, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lab.random_models import distinct_tokens, write_random_model
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.evaluation.inspected_prompt import InspectedPrompt
from vllm_kvcompress.evaluation.inspection import InspectedSetting, inspect_prompt, load_replay
from vllm_kvcompress.evaluation.quality.prompts import Prompter
from vllm_kvcompress.evaluation.quality.replay_runner import ReplayRunner
from vllm_kvcompress.evaluation.quality.sample import Sample
from vllm_kvcompress.evaluation.quality.variants import Variant
from vllm_kvcompress.evaluation.replay_checks import check_all_full, check_full_or_windowed
from vllm_kvcompress.evaluation.tuning.grid import make_candidates
from vllm_kvcompress.evaluation.tuning.measuring import LossMeter
from vllm_kvcompress.evaluation.tuning.prompts_file import read_prompts

FULL, WINDOW = (1, 3), 96
VARIANTS = [Variant("none"), Variant("pyramidkv", 0.5), Variant("pyramidkv", 0.12)]


class Numbers:
    """A tokenizer whose words are token ids."""

    chat_template = bos_token_id = None
    eos_token_id = 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return " ".join(map(str, token_ids))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_random_model(tmp_path_factory.mktemp("gemma3"), "gemma3")


def test_answers_and_bytes_kept(model: Path) -> None:
    """Bytes are counted in full layers, and their budgets are those of layer groups among them."""
    runner = ReplayRunner(model, Prompter(Numbers()), 16, "cpu")
    ids = distinct_tokens(700)
    text, question = (" ".join(map(str, part)) for part in (ids[:690], ids[690:]))
    sample = Sample("1", "t", text, question, ("nothing",), "all_in", 8)
    found = {record.budget: record for record in runner.measure(sample, "visible", VARIANTS)}
    prefilled = runner.replay.prefill(ids)
    answers = set()
    for variant in VARIANTS:
        setting, record = variant.setting(), found[variant.budget]
        tokens = runner.replay.generate(prefilled, setting, 8)
        answers.add(record.answer)
        assert record.answer == runner.prompter.text(tokens)
        rows = runner.replay.rows(prefilled, setting)[0]
        kept = [rows[number][0].shape[1] for number in FULL]
        assert record.kept == pytest.approx(sum(kept) / (2 * 700), abs=1e-5)
        assert setting is None or kept[0] > kept[1], "a pyramid over the two full layers"
    assert len(answers) == len(VARIANTS)


def test_tune_measures_agreement_token_by_token(model: Path, tmp_path: Path) -> None:
    meter = LossMeter(model, Prompter(Numbers()), "agreement", 8, 16)
    path = tmp_path / "mine.jsonl"
    ids = distinct_tokens(600, seed=3)
    path.write_text(json.dumps({"prompt": " ".join(map(str, ids))}) + "\n")
    (prompt,) = read_prompts(path, False, 8)
    candidates = make_candidates(["snapkv-w7-o16", "keydiff-o16"], [1.0, 0.5, 0.12])
    replay = meter.replay
    prefilled = replay.prefill(ids)
    said = replay.generate(prefilled, None, 9)
    found = {loss.setting: loss for loss in meter.losses(prompt, candidates)}
    for each in candidates:
        cache = replay.view(prefilled, each.config)
        lost = [
            replay.next_token(cache, said[place], len(ids) + place) != said[place + 1]
            for place in range(8)
        ]
        assert found[each.digest].loss == sum(lost) / 8, each.name
    assert len({loss.loss for loss in found.values()}) > 2


def test_inspect_shows_the_full_layers(model: Path) -> None:
    ids, replay = distinct_tokens(400), load_replay(model, 16)
    config = parse_config("pyramidkv", {"min_prompt_len": 0})
    assert config is not None
    prompt = InspectedPrompt(ids, [], False, list(range(60, 70)))
    setting = InspectedSetting(config, None, None)
    found = inspect_prompt(replay, prompt, setting)
    rows = found.rows()
    assert [(row.group, row.layers) for row in rows] == [(0, [1]), (1, [3])]
    survivors = replay.survivors(replay.prefill(ids), config)
    for layer in FULL:
        for head, row in enumerate(survivors[layer]):
            assert np.flatnonzero(found.kept[layer, head]).tolist() == sorted(row.tolist())
    assert found.kept_share == pytest.approx(found.kept[list(FULL)].mean())
    assert not found.kept[0, :, : 400 - WINDOW].any(), "a window, whatever the setting"
    assert found.all_layers == "all full layers"
    assert any(f"2 further layers keep the last {WINDOW} tokens" in note for note in found.notes)
    shared = parse_config("windowkv", {"min_prompt_len": 0, "policy": {"layers_per_leader": 2}})
    assert shared is not None
    setting = InspectedSetting(shared.by_task["aggregation"], None, None)
    assert [row.leader for row in inspect_prompt(replay, prompt, setting).rows()] == [1]
    with pytest.raises(ConfigError, match="layer 0 keeps its window .*allowed: 1, 3"):
        inspect_prompt(replay, prompt, setting, [0])


def test_books_are_measured_where_all_layers_are_full(model: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="sliding-window layers beside full ones"):
        check_all_full(load_replay(model, 16))


def test_layers_of_other_kinds_are_refused() -> None:
    text = {"num_hidden_layers": 2, "layer_types": ["chunked_attention", "full_attention"]}
    replay: Any = SimpleNamespace(text_config=SimpleNamespace(**text), longest=4096)
    with pytest.raises(UnsupportedModelError, match="layers of the kind chunked_attention"):
        check_full_or_windowed(replay)


def test_windowed_layers_alone_are_refused(model: Path, tmp_path: Path) -> None:
    fields = json.loads((model / "config.json").read_text())
    fields["layer_types"] = ["sliding_attention"] * 4
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "model.safetensors").symlink_to(model / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="no layer of it attends to everything"):
        load_replay(tmp_path, 16)

"""Replays of models some of whose layers have a recurrent state."""

from pathlib import Path

import pytest
import torch

from lab.random_hybrids import write_random_hybrid
from lab.random_models import distinct_tokens
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.evaluation.replay import Prefilled, Replay
from vllm_kvcompress.evaluation.replay_batch import ReplayBatch

SETTING = parse_config(
    {"preset": "snapkv", "budget": {"ratio": 0.25, "floor": 1}, "min_prompt_len": 64}
)
FULL_LAYERS = {"lfm2": (1, 3), "granite4": (1, 3), "nemotron_h": (2, 5)}


@pytest.fixture(scope="module", params=FULL_LAYERS)
def replay(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    folder: Path = tmp_path_factory.mktemp(request.param)
    replay = Replay(str(write_random_hybrid(folder, request.param)))
    assert replay.full_layers == FULL_LAYERS[request.param]
    return replay


@pytest.fixture(scope="module")
def prompt(replay: Replay) -> Prefilled:
    return replay.prefill(distinct_tokens(300))


def test_the_whole_cache_gives_the_models_own_tokens(replay: Replay, prompt: Prefilled) -> None:
    found = replay.model.generate(
        torch.tensor([prompt.token_ids]), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert replay.generate(prompt, None, 8) == found[0, 300:].tolist()


def test_a_replay_leaves_the_prompts_states_as_they_are(replay: Replay, prompt: Prefilled) -> None:
    compressed = replay.generate(prompt, SETTING, 8)
    whole = replay.generate(prompt, None, 8)
    assert compressed != whole, "or nothing would show"
    assert replay.generate(prompt, SETTING, 8) == compressed
    assert replay.generate(prompt, None, 8) == whole


def test_layers_without_keys_keep_no_tokens(replay: Replay, prompt: Prefilled) -> None:
    kept = [positions.shape[1] for positions in replay.survivors(prompt, SETTING)]
    full = set(replay.full_layers)
    assert [bool(count) for count in kept] == [n in full for n in range(len(replay.layers))]
    assert all(kept[number] < 300 for number in full)


def test_caches_are_not_decoded_together(replay: Replay, prompt: Prefilled) -> None:
    with pytest.raises(UnsupportedModelError, match="recurrent layers.*not decoded together"):
        ReplayBatch(replay, [replay.rows(prompt, SETTING)[0]], 300)

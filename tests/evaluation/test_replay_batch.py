"""Caches decoded together give what each gives alone."""

import pytest
import torch

from lab.random_models import write_random_model
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation.replay import Prefilled, Replay
from vllm_kvcompress.evaluation.replay_batch import ReplayBatch
from vllm_kvcompress.request_options import parse_request, resolve_request

PRESETS = ("snapkv", "pyramidkv", "windowkv", "streaming_llm")
NUM_TOKENS = 12


@pytest.fixture(scope="module", params=["probe", "gemma3"])
def replay(
    request: pytest.FixtureRequest, probe_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Replay:
    """Full layers alone, and windowed ones between them."""
    torch.set_num_threads(1)
    if request.param == "probe":
        return Replay(probe_model, 32)
    return Replay(str(write_random_model(tmp_path_factory.mktemp("model"), request.param)), 32)


@pytest.fixture(scope="module")
def prompt(replay: Replay) -> Prefilled:
    return replay.prefill([5 + (i * 7919) % 900 for i in range(700)])


def settings() -> list:
    """Unequal lengths between settings, and between layers of pyramids."""
    found = []
    for preset in PRESETS:
        config = parse_config(preset)
        for ratio in (0.5, 0.12):
            options = parse_request({"kv_budget_ratio": ratio})
            found.append(resolve_request(config, options, "localization"))
    return [None, *found]


def first_of(prompt: Prefilled, count: int) -> torch.Tensor:
    return torch.full((count,), prompt.first_token)


def test_tokens_are_those_of_each_alone(replay: Replay, prompt: Prefilled) -> None:
    each = settings()
    expected = [replay.generate(prompt, setting, NUM_TOKENS) for setting in each]
    assert len({tuple(tokens) for tokens in expected}) > 2, "settings that differ"
    caches = [replay.rows(prompt, setting)[0] for setting in each]
    batch = ReplayBatch(replay, caches, len(prompt.token_ids))
    assert batch.decode(first_of(prompt, len(each)), NUM_TOKENS) == expected


def test_several_tokens_at_once_are_those_one_by_one(replay: Replay, prompt: Prefilled) -> None:
    """What the protocol "hidden" and continuations do; layers hold different numbers of tokens."""
    caches = [replay.rows(prompt, setting)[0] for setting in settings()]
    tokens = torch.tensor([[7, 300, 12, 45, 9]]).expand(len(caches), -1)
    together = ReplayBatch(replay, caches, len(prompt.token_ids)).extend(tokens)
    single = ReplayBatch(replay, caches, len(prompt.token_ids))
    for index in range(tokens.shape[1]):
        logits = single.extend(tokens[:, index : index + 1])[:, 0]
        torch.testing.assert_close(logits, together[:, index], rtol=1e-3, atol=1e-3)


def test_the_whole_cache_is_extended_as_the_model_itself_would(replay: Replay) -> None:
    ids = [5 + (i * 31) % 900 for i in range(600)]
    whole = replay.model(torch.tensor([ids])).logits[0, -20:]
    prompt = replay.prefill(ids[:-20])
    batch = ReplayBatch(replay, [replay.rows(prompt, None)[0]], 580)
    found = batch.extend(torch.tensor([ids[-20:]]))[0]
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)


def test_a_stop_token_ends_one_answer_and_not_the_others(replay: Replay, prompt: Prefilled) -> None:
    each = settings()
    expected = [replay.generate(prompt, setting, NUM_TOKENS) for setting in each]
    stop = expected[-1][3]
    caches = [replay.rows(prompt, setting)[0] for setting in each]
    batch = ReplayBatch(replay, caches, len(prompt.token_ids))
    found = batch.decode(first_of(prompt, len(each)), NUM_TOKENS, frozenset({stop}))
    for tokens, whole in zip(found, expected, strict=True):
        end = whole.index(stop) if stop in whole else NUM_TOKENS
        assert tokens == whole[:end]


def test_the_prompt_stays_as_it_is(replay: Replay, prompt: Prefilled) -> None:
    before = [keys.clone() for keys in prompt.keys]
    batch = ReplayBatch(replay, [replay.rows(prompt, None)[0]] * 2, len(prompt.token_ids))
    batch.decode(first_of(prompt, 2), 4)
    assert all(torch.equal(a, b) for a, b in zip(before, prompt.keys, strict=True))

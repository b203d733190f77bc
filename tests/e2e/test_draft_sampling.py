"""Sampling in draft mode follows the target's distribution: a chi-square test on eight tokens.

Every sampled token is compared with the target's exact distribution behind its own prefix (Hugging
Face, float64 from the logits on). Summed over all tokens, the difference D between counts and
probabilities has mean 0 and covariance C = sum of diag(p) - p p^T, whatever depends on what before
it, so D^T C^+ D follows a chi-square distribution with 7 degrees of freedom. Tokens are counted by
name, and by their rank in the distribution: what favours drafts favours the first ranks.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.e2e.conftest import opened

pytestmark = pytest.mark.engine

VOCAB, NUM_REQUESTS, NUM_TOKENS, PROMPT_LEN = 8, 32, 32, 200
LIMIT = 24.32  # chi-square, 7 degrees of freedom: passed by chance once in 1,000 runs


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random Llama with eight tokens and distributions that are neither flat nor certain."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.25,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("eight-tokens")
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return np.random.default_rng(0).integers(0, VOCAB, PROMPT_LEN).tolist()


def target_probabilities(model: Path, prompt: list[int], tokens: list[list[int]]) -> np.ndarray:
    """[requests, tokens, VOCAB] float64: the target's distribution each token was drawn from."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        ids = torch.tensor([prompt + each for each in tokens])
        logits = reference(ids).logits[:, len(prompt) - 1 : -1].double()
    return logits.softmax(dim=-1).numpy()


def by_rank(tokens: list[list[int]], probabilities: np.ndarray) -> tuple[list, np.ndarray]:
    """Ranks of tokens, 0 for the most probable, and probabilities of the ranks."""
    order = np.argsort(-probabilities, axis=-1)
    ranks = np.argsort(order, axis=-1)
    found = np.take_along_axis(ranks, np.array(tokens)[..., None], axis=-1)[..., 0]
    return found.tolist(), np.take_along_axis(probabilities, order, axis=-1)


def statistic(tokens: list[list[int]], probabilities: np.ndarray) -> float:
    counts = np.bincount(np.ravel(tokens), minlength=VOCAB)
    flat = probabilities.reshape(-1, VOCAB)
    difference = counts - flat.sum(axis=0)
    covariance = np.diag(flat.sum(axis=0)) - flat.T @ flat
    return float(difference @ np.linalg.pinv(covariance) @ difference)


@pytest.mark.parametrize("sample", ["greedy", "probabilistic"])
def test_sampled_tokens_follow_the_targets_distribution(model: Path, prompt, sample: str) -> None:
    setting: dict[str, Any] = {
        "preset": "streaming_llm",
        "budget": {"tokens": 64, "floor": 1},
        "mode": "draft",
        "draft": {"tokens": 2, "sample": sample},
        "min_prompt_len": 0,
    }
    with opened(
        str(model), setting, skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=NUM_REQUESTS
    ) as engine:
        from vllm import SamplingParams

        engine.generate([prompt], 1, ignore_eos=True)  # the others find it in the prefix cache
        params = [
            SamplingParams(
                temperature=1.0, seed=seed, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False
            )
            for seed in range(NUM_REQUESTS)
        ]
        before = engine.num_steps
        for number, each in enumerate(params):
            engine.results[str(number)] = type(engine.results["request-0-0"])()
            engine.engine.add_request(str(number), {"prompt_token_ids": prompt}, each)
        engine.drain()
        tokens = [engine.results[str(number)].token_ids for number in range(NUM_REQUESTS)]
        steps = engine.num_steps - before
    assert steps < NUM_TOKENS, "no drafts were accepted: the test shows nothing"
    assert len({tuple(each) for each in tokens}) == NUM_REQUESTS
    probabilities = target_probabilities(model, prompt, tokens)
    assert 0.3 < probabilities.max(axis=-1).mean() < 0.9, "neither flat nor certain"
    assert statistic(tokens, probabilities) < LIMIT
    assert statistic(*by_rank(tokens, probabilities)) < LIMIT
    # The test can fail: the same tokens tell a slightly sharper distribution apart.
    sharper = probabilities**1.3
    sharper /= sharper.sum(axis=-1, keepdims=True)
    assert statistic(*by_rank(tokens, sharper)) > LIMIT

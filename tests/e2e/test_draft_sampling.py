"""Sampling in draft mode follows the target's distribution: a chi-square test on eight tokens.

Every sampled token is compared with the target's exact distribution behind its own prefix (Hugging
Face, float64 from the logits on). Summed over all tokens, the difference D between counts and
probabilities has mean 0 and covariance C = sum of diag(p) - p p^T, whatever depends on what before
it, so D^T C^+ D follows a chi-square distribution with 7 degrees of freedom. Tokens are counted by
name, and by their rank in the distribution: what favours drafts favours the first ranks.

Typical acceptance, which is lossy by design, fails that test and is held to its own promises.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lab.speculation.engines import spec_counts
from tests.e2e.conftest import assert_idle, opened
from vllm_kvcompress.core.report import savings_line
from vllm_kvcompress.evaluation.engine import Engine, Result
from vllm_kvcompress.worker.draft.typical_acceptance import TypicalAcceptanceSampler

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
        if sample == "probabilistic":
            what_is_no_number_is_drawn_exactly(engine)
            failed_drafts_are_certain(engine)
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


def what_is_no_number_is_drawn_exactly(engine: Engine) -> None:
    """Acceptance is exact for any draft that was drawn from the probabilities it is told."""
    step = engine.runner.speculator.step
    logits = torch.zeros(4, VOCAB)
    logits[0], logits[1, 2], logits[2, 3] = float("nan"), float("nan"), float("inf")
    step.requests[:4], step.temperature[:4] = torch.arange(4), 1.0
    step.number.zero_()
    with torch.inference_mode():
        drawn, best = step._sample(logits)
    assert best.isnan().tolist() == [True, True, False, False], "and it is told"
    told = step.draft_logits[:4, 0].softmax(dim=-1)
    assert not told.isnan().any() and (told.gather(1, drawn[:, None]) > 0).all()
    assert torch.equal(told[0], told[3]) and drawn[2] == 3


def failed_drafts_are_certain(engine: Engine) -> None:
    speculator = engine.runner.speculator
    drafts = torch.full((3, 2), 5)
    with torch.inference_mode():
        speculator.draft_logits.fill_(1.0)
        speculator._write_certain(np.array([0, 2]), np.array([4, 1, 7]), drafts)
    assert drafts.tolist() == [[0, 0], [5, 5], [0, 0]]
    told = speculator.draft_logits.softmax(dim=-1)
    assert told[[4, 7]].tolist() == [[[1.0] + [0.0] * (VOCAB - 1)] * 2] * 2
    assert (speculator.draft_logits[[1, 5]] == 1).all()


TYPICAL: dict[str, Any] = {
    "preset": "streaming_llm",
    "budget": {"tokens": 64, "floor": 1},
    "mode": "draft",
    "draft": {"tokens": 3, "acceptance": "typical"},
    "min_prompt_len": 128,
}
ARGUMENTS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_seqs": NUM_REQUESTS,
    "disable_log_stats": False,
}


def add(
    engine: Engine, name: str, prompt: list[int], xargs: dict | None = None, **sampling
) -> None:
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, extra_args=xargs, **sampling
    )
    engine.results[name] = Result()
    engine.engine.add_request(name, {"prompt_token_ids": prompt}, params)


def sampled(
    engine: Engine, prompt: list[int], name: str, num_seeds: int
) -> tuple[list[list[int]], dict[str, float], int]:
    """Tokens of requests of the same prompt, growth of vLLM's counters, tokens behind the ends."""
    before, verified = spec_counts(engine), []
    scheduler, observe = engine.scheduler, engine.scheduler.observe_drafts

    def record(request_id: str, num_drafts: int, num_accepted: int) -> None:
        verified.append(num_accepted)
        observe(request_id, num_drafts, num_accepted)

    scheduler.observe_drafts = record
    for seed in range(num_seeds):
        add(engine, f"{name}-{seed}", prompt, temperature=1.0, seed=seed)
    engine.drain()
    scheduler.observe_drafts = observe
    counts = {key: count - before[key] for key, count in spec_counts(engine).items()}
    tokens = [engine.results[f"{name}-{seed}"].token_ids for seed in range(num_seeds)]
    assert counts["drafts"] == len(verified) and counts["accepted_tokens"] == sum(verified)
    return tokens, counts, len(verified) + sum(verified) - num_seeds * (NUM_TOKENS - 1)


def test_drafts_drawn_at_random_go_without_their_probabilities(model: Path, prompt) -> None:
    """Typical acceptance does not ask for them, so no room is held for the draft's logits."""
    draft = {**TYPICAL["draft"], "sample": "probabilistic"}
    with opened(str(model), {**TYPICAL, "draft": draft}, **ARGUMENTS) as engine:
        assert engine.runner.speculator.draft_logits is None
        tokens, counts, cut_off = sampled(engine, prompt, "drawn", 2)
        assert tokens[0] != tokens[1] and counts["accepted_tokens"] > 0
        assert 0 <= cut_off <= 3 * 2
        assert_idle(engine)


@pytest.fixture(scope="module")
def typical(model: Path) -> Iterator[Engine]:
    """For the tests from here on; those above open engines of their own."""
    with opened(str(model), TYPICAL, **ARGUMENTS) as engine:
        yield engine


def test_typical_acceptance_accepts_more_and_is_lossy(
    typical: Engine, model: Path, prompt, record_property
) -> None:
    runner = typical.runner
    assert type(runner.rejection_sampler) is TypicalAcceptanceSampler
    tokens, counts, cut_off = sampled(typical, prompt, "typical", 20)
    assert 0 <= cut_off <= 3 * 20, "accepted drafts and one token per pass are the output"
    own, stock = runner.rejection_sampler, type(runner.rejection_sampler).__base__
    runner.rejection_sampler = stock(runner.sampler, runner.speculative_config, runner.device)
    try:
        _, exact, _ = sampled(typical, prompt, "exact", 8)
    finally:
        runner.rejection_sampler = own
    shares = [each["accepted_tokens"] / each["draft_tokens"] for each in (counts, exact)]
    assert shares[0] > shares[1] + 0.1 > 0.15, shares
    # What rejection sampling passes above, with more tokens.
    probabilities = target_probabilities(model, prompt, tokens)
    found = statistic(tokens, probabilities), statistic(*by_rank(tokens, probabilities))
    record_property("figures", {"typical": counts, "rejection": exact, "statistics": found})
    assert max(found) > LIMIT, found
    assert_idle(typical)


def test_greedy_and_undrafted_requests_do_not_notice(typical: Engine, prompt) -> None:
    """Each alone, without drafts (vLLM's plain sampler), then all in steps with drafted ones."""
    none, short = {"kv_draft_tokens": 0}, prompt[:60]
    cases: dict[str, tuple[list[int], dict | None, dict[str, Any]]] = {
        "greedy": (prompt, None, {"temperature": 0.0}),
        "short": (short, None, {"temperature": 1.0, "seed": 5}),
        "top-p": (short, None, {"temperature": 0.8, "top_p": 0.7, "top_k": 5, "seed": 6}),
        "opted-out": (prompt, none, {"temperature": 1.0, "seed": 7, "repetition_penalty": 1.2}),
    }
    for name, (ids, _, sampling) in cases.items():
        add(typical, f"{name}-alone", ids, none, **sampling)
        typical.drain()
    before = spec_counts(typical)["accepted_tokens"]
    for name, (ids, xargs, sampling) in cases.items():
        add(typical, name, ids, xargs, **sampling)
    for seed in range(3):
        cut = {"top_p": 0.9} if seed == 2 else {}
        add(typical, f"beside-{seed}", prompt, temperature=1.0, seed=seed, **cut)
    typical.drain()
    assert spec_counts(typical)["accepted_tokens"] > before
    for name in cases:
        found, alone = (typical.results[each].token_ids for each in (name, f"{name}-alone"))
        assert len(found) == NUM_TOKENS and found == alone, name
    add(typical, "again", prompt, temperature=1.0, seed=1)
    typical.drain()
    again, beside = (typical.results[each].token_ids for each in ("again", "beside-1"))
    assert again == beside, "a seed gives the same tokens in any batch"
    assert_idle(typical)


def test_the_start_up_line_says_that_it_is_lossy(typical: Engine) -> None:
    scheduler = typical.scheduler
    line = savings_line(scheduler.planner.config, scheduler.kv_cache_config, 1024)
    assert "LOSSY: typical acceptance (epsilon 0.09, delta 0.3)" in line
    exact = scheduler.planner.config.model_copy(
        update={
            "draft": scheduler.planner.config.draft.model_copy(update={"acceptance": "rejection"})
        }
    )
    assert "LOSSY" not in savings_line(exact, scheduler.kv_cache_config, 1024)

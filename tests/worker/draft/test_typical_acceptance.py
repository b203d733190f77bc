"""Typical acceptance against the rule written out in plain Python."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.worker.cpu import buffer_utils as cpu_buffer_utils
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.states import SamplingStates

from tests.kernels.paged import DEVICE
from vllm_kvcompress.worker.draft import typical_acceptance
from vllm_kvcompress.worker.draft.typical_acceptance import (
    TypicalAcceptanceSampler,
    is_typical,
    longest_prefix,
)

NUM_STEPS = 4


@pytest.fixture(autouse=True)
def host_buffers(monkeypatch) -> None:
    """Where there is no GPU, vLLM's CPU worker replaces pinned buffers by plain ones."""
    if DEVICE == "cpu":
        monkeypatch.setattr(buffer_utils, "UvaBuffer", cpu_buffer_utils.UvaBuffer)


def probabilities(logits: list[float]) -> list[float]:
    best = max(logits)
    exps = [math.exp(x - best) for x in logits]
    return [e / sum(exps) for e in exps]


def stands(logits: list[float], draft: int, epsilon: float, delta: float) -> bool:
    p = probabilities(logits)
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    return draft >= 0 and p[draft] > min(epsilon, delta * math.exp(-entropy))


def expected_tokens(
    rows: list[list[float]], drafts: list[int], own: list[int], greedy: bool, rule: tuple
) -> list[int]:
    """Of one request: `rows` of logits and `own` tokens, one more of each than of drafts."""
    found: list[int] = []
    for logits, draft, other in zip(rows, drafts, own, strict=False):
        accepted = draft == other if greedy else stands(logits, draft, *rule)
        if not accepted:
            return [*found, other]
        found.append(draft)
    return [*found, own[len(drafts)]]


def sampler_of(params: list[SamplingParams], vocab: int, rule: tuple = (0.09, 0.3)) -> Any:
    """Over vLLM's own sampling states, request i in row i; no penalties and the like."""
    states = SamplingStates(len(params), vocab)
    for row, each in enumerate(params):
        states.add_request(row, each)
    states.apply_staged_writes()

    def apply_sampling_params(logits, expanded, idx_mapping, rows, *_args) -> torch.Tensor:
        logits = logits.clone()
        states.apply_temperature(logits, expanded, rows)
        states.apply_min_p(logits, expanded, rows)
        return states.apply_top_k_top_p(logits, expanded, rows)

    stub = SimpleNamespace(
        sampling_states=states, use_fp64_gumbel=False, apply_sampling_params=apply_sampling_params
    )
    config: Any = SimpleNamespace(
        num_speculative_tokens=NUM_STEPS,
        enable_adaptive_verification=False,
        rejection_sample_method="standard",
        fly_entropy_threshold=0.3,  # read by vLLM 0.33, with any method
        fly_entropy_top_k=3,
    )
    return TypicalAcceptanceSampler(stub, config, torch.device(DEVICE), *rule)  # type: ignore[arg-type]


def verify(
    sampler: Any, logits: torch.Tensor, drafts: list[list[int]]
) -> tuple[torch.Tensor, list[list[int]], torch.Tensor]:
    """Processed logits, tokens of every request, and own tokens as vLLM's plain sampler has them.

    A draft of -1 marks what may not be accepted. The first input of a request is the token before
    its drafts, one that no vocabulary here has.
    """
    counts = np.array([1 + len(each) for each in drafts])
    rows = np.arange(len(drafts))
    cu = torch.from_numpy(np.concatenate([[0], counts.cumsum()])).to(DEVICE, torch.int32)
    expanded = torch.from_numpy(rows.repeat(counts)).to(DEVICE, torch.int32)
    mapping = torch.from_numpy(rows).to(DEVICE, torch.int32)
    local = torch.cat([torch.arange(count) for count in counts]).to(DEVICE)
    inputs = torch.tensor([token for each in drafts for token in (7777, *each)], dtype=torch.int32)
    inputs, pos = inputs.to(DEVICE), local + 50
    processed, sampled, num_sampled = sampler._verify(
        logits.to(DEVICE), None, inputs, pos, cu, mapping, rows, expanded, local, rows, inputs
    )
    assert sampled.shape == (len(drafts), NUM_STEPS + 1) and sampled.dtype == torch.int64
    assert num_sampled.dtype == torch.int32
    tokens = [row[:n] for row, n in zip(sampled.tolist(), num_sampled.tolist(), strict=True)]
    states = sampler.sampler.sampling_states
    own = gumbel_sample(
        processed, expanded, states.temperature.gpu, states.seeds.gpu, pos,
        apply_temperature=False, is_drafting=False,
    )  # fmt: skip
    return processed, tokens, own


@pytest.mark.parametrize("seed", range(8))
def test_a_mixed_batch_follows_the_rule(seed: int) -> None:
    """Greedy, plain, scaled and truncated requests, with 0 to k drafts, some of them refused."""
    rng, rule = np.random.default_rng(seed), [(0.2, 0.6), (0.6, 0.9)][seed % 2]
    vocab, num_reqs = int(rng.integers(3, 9)), 12
    params = [
        SamplingParams(
            temperature=[0.0, 1.0, 0.6, 1.5][row % 4],
            top_k=[0, 2][row % 5 == 1],
            top_p=[1.0, 0.7][row % 5 == 2],
            min_p=[0.0, 0.3][row % 5 == 3],
            seed=row,
        )
        for row in range(num_reqs)
    ]
    counts = [*rng.permutation(NUM_STEPS + 1), *rng.integers(0, NUM_STEPS + 1, num_reqs - 5)]
    drafts = [rng.integers(0, vocab, count).tolist() for count in counts]
    logits = torch.from_numpy(rng.normal(0, 1.5, (sum(counts) + num_reqs, vocab))).float()
    start = 0
    for each in drafts:  # most drafts are the target's best tokens, or few would be accepted
        for place in range(len(each)):
            if rng.random() < 0.6:
                each[place] = int(logits[start + place].argmax())
            elif rng.random() < 0.2:
                each[place] = -1
        start += 1 + len(each)
    processed, found, own = verify(sampler_of(params, vocab, rule), logits, drafts)
    start, lengths = 0, set()
    for row, each in enumerate(drafts):
        stop = start + 1 + len(each)
        rows, others = processed[start:stop].double().tolist(), own[start:stop].tolist()
        assert found[row] == expected_tokens(rows, each, others, row % 4 == 0, rule), row
        if row % 4 == 0:
            assert others == logits[start:stop].argmax(dim=1).tolist()
        lengths.add((len(found[row]), len(each)))
        start = stop
    assert len(lengths) > 5, "some are accepted whole, some in part, some not at all"


def test_sure_targets_are_strict_and_open_ones_lenient() -> None:
    """The paper's defaults on numbers worked out by hand."""
    open_ = torch.zeros(1, 100)  # p = 0.01 each, exp(-H) = 0.01, threshold 0.003
    assert is_typical(open_, torch.tensor([42]), 0.09, 0.3)
    sure = torch.log(torch.tensor([[0.9, 0.06, 0.04]]))  # exp(-H) = 0.675, threshold 0.09
    assert is_typical(sure.expand(3, 3), torch.arange(3), 0.09, 0.3).tolist() == [
        True,
        False,
        False,
    ]
    assert is_typical(sure.expand(3, 3), torch.arange(3), 0.05, 0.3).tolist() == [True, True, False]
    # 0.06 > 0.05 * 0.675: the entropy's threshold is the lower one.
    assert is_typical(sure, torch.tensor([1]), 0.09, 0.05)


def test_boundaries() -> None:
    quarter = torch.zeros(1, 4)
    for epsilon, expected in ((0.25, False), (0.2499, True)):
        assert is_typical(quarter, torch.tensor([3]), epsilon, 2.0).item() == expected, "above it"
    cut = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]])
    drafts = torch.tensor([0, 1, 2, -1, 4])
    found = is_typical(cut.expand(5, 4), drafts, 1e-6, 1e-6)
    assert found.tolist() == [True, True, False, False, False]
    certain = torch.tensor([[-math.inf, 3.0]])
    assert is_typical(certain.expand(2, 2), torch.tensor([0, 1]), 0.9, 0.9).tolist() == [
        False,
        True,
    ]
    broken = torch.full((1, 4), math.nan)
    assert not is_typical(broken, torch.tensor([0]), 0.09, 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_token_always_stands(dtype: torch.dtype) -> None:
    """Its probability is at least exp(-entropy), and settings keep delta below 1."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(200, 50, generator=generator) * torch.linspace(0, 8, 200)[:, None]).to(
        dtype
    )
    assert is_typical(logits, logits.argmax(dim=1), 0.999, 0.999).all()


def test_large_batches_are_looked_at_in_parts(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(37, 20, generator=generator)
    drafts = torch.randint(0, 20, (37,), generator=generator)
    whole = is_typical(logits, drafts, 0.09, 0.3)
    assert 5 < whole.sum() < 32
    monkeypatch.setattr(typical_acceptance, "_MAX_ENTRIES", 5 * 20 + 3)
    assert torch.equal(is_typical(logits, drafts, 0.09, 0.3), whole)
    monkeypatch.setattr(typical_acceptance, "_MAX_ENTRIES", 7)
    assert torch.equal(is_typical(logits, drafts, 0.09, 0.3), whole)


def test_the_longest_prefix_counts_and_neighbours_do_not() -> None:
    """A request's last row stands by accident in all of them: it has no draft."""
    yes, no = True, False
    verdicts = [[yes, yes, no, yes, yes], [yes], [no, yes], [yes, yes], [yes] * 5]
    flat = torch.tensor([each for row in verdicts for each in row])
    drafts, own = torch.arange(len(flat)) + 100, torch.arange(len(flat)) + 200
    cu = torch.tensor([0, 5, 6, 8, 10, 15], dtype=torch.int32)
    sampled, num_sampled = longest_prefix(flat, drafts, own, cu, NUM_STEPS)
    found = [row[:n] for row, n in zip(sampled.tolist(), num_sampled.tolist(), strict=True)]
    assert found == [[100, 101, 202], [205], [206], [108, 209], [110, 111, 112, 113, 214]]


def test_a_rejected_place_samples_the_target_itself() -> None:
    """Not the rest without the rejected draft, as rejection sampling must."""
    num_reqs = 60
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(num_reqs)]
    row = torch.log(torch.tensor([0.5, 0.3, 0.2]))  # 0.9 exp(-H) = 0.321
    sampler = sampler_of(params, 3, (0.9, 0.9))
    _, found, _ = verify(sampler, row.expand(2 * num_reqs, 3), [[1]] * num_reqs)
    assert all(len(each) == 1 for each in found)
    counts = np.bincount([each[0] for each in found], minlength=3)
    # Four standard deviations of the binomial distribution.
    assert np.all(np.abs(counts - [30, 18, 12]) < 4 * np.sqrt([15, 12.6, 9.6])), counts


def test_a_row_without_drafts_does_not_see_its_neighbours() -> None:
    """The same token as alone, which is that of vLLM's plain sampler."""
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in (3, 4, 5)]
    logits = torch.randn(9, 200, generator=torch.Generator().manual_seed(2))
    drafts = [[1, 2, 3], [], [4, 5, 6]]
    _, found, _ = verify(sampler_of(params, 200), logits, drafts)
    _, alone, own = verify(sampler_of(params[1:2], 200), logits[4:5], [[]])
    assert found[1] == alone[0] == own.tolist()
    _, other, _ = verify(sampler_of([SamplingParams(seed=9)], 200), logits[4:5], [[]])
    assert other != alone, "the request's seed decides"


def test_greedy_batches_look_at_no_probabilities(monkeypatch) -> None:
    def fail(*_args) -> None:
        raise AssertionError("entropies cost a pass over all logits")

    monkeypatch.setattr(typical_acceptance, "is_typical", fail)
    logits = torch.eye(6)[:, :5] * 4
    params = [SamplingParams(temperature=0)] * 2
    _, found, _ = verify(sampler_of(params, 5), logits[[0, 1, 2, 3, 4, 0]], [[0, 1, 9], [4]])
    assert found == [[0, 1, 2], [4, 0]]

"""Every policy: the interface's promises, and its formula against plain numpy."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.formulas.test_window_attention import loops
from tests.policies.cases import CASES
from tests.policies.helpers import changed, make_inputs, select
from vllm_kvcompress.kernels.cache.rows import DenseRows
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ChunkInputs, Queries, ScoreInputs
from vllm_kvcompress.registry import load_policy_class, policy_names

ALL = [(name, params) for name, rows in CASES.items() for params in rows]


def build(name: str, params: dict[str, Any]) -> Policy:
    return load_policy_class(name)(**params)


def inputs_for(policy: Policy, num_tokens: int = 150, window: int = 16, seed: int = 0, **changes):
    """What the worker would hand this policy at the end of a prompt: what it asked for, no more."""
    given = make_inputs(num_tokens, window, seed, **changes)
    wants = policy.queries
    if wants is Queries.PROMPT:
        generator = torch.Generator().manual_seed(seed + 1)
        queries = torch.randn(8, num_tokens, 32, generator=generator)
        rotary = given.rotary if policy.needs_rotary else None
        rows = DenseRows(given.keys, given.values, queries, given.scale)
        chunk = ChunkInputs(rows, 0, num_tokens, 4, rotary)
        given = changed(given, accumulated=policy.accumulate(None, chunk))
    return changed(
        given,
        queries=given.queries if wants is Queries.WINDOW else None,
        rotary=given.rotary if policy.needs_rotary else None,
        output_projection=given.output_projection if policy.needs_output_projection else None,
    )


def inputs(**kwargs: Any) -> ScoreInputs:
    return make_inputs(**kwargs)


def test_the_table_names_every_installed_policy() -> None:
    assert set(policy_names()) == set(CASES)


@pytest.mark.parametrize(("name", "params"), ALL)
@pytest.mark.parametrize("num_tokens", [17, 64, 111])
def test_scores_have_the_promised_form(name: str, params: dict, num_tokens: int) -> None:
    policy = build(name, params)
    scores = policy.score(inputs_for(policy, num_tokens))
    assert scores.shape == (2, num_tokens)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


@pytest.mark.parametrize(("name", "params"), ALL)
def test_the_same_request_always_gets_the_same_scores(name: str, params: dict) -> None:
    policy = build(name, params)
    first = policy.score(inputs_for(policy, seed=1)).clone()
    policy.score(inputs_for(policy, seed=2))  # another request in between leaves no trace
    assert torch.equal(policy.score(inputs_for(policy, seed=1)), first)


@pytest.mark.parametrize(("name", "params"), ALL)
def test_selection_keeps_forced_tokens_in_order(name: str, params: dict) -> None:
    policy = build(name, params)
    scores = policy.score(inputs_for(policy))[:, :128]
    forced = torch.zeros(128, dtype=torch.bool)
    forced[[0, 1, 50, 127]] = True
    kept = select(scores, forced, 32)
    assert kept.shape == (2, 32)
    for row in kept.tolist():
        assert all(a < b for a, b in pairwise(row))
        assert {0, 1, 50, 127} <= set(row)


@pytest.mark.parametrize(("name", "params"), ALL)
def test_what_was_not_asked_for_is_not_read(name: str, params: dict) -> None:
    """`inputs_for` leaves out all else; a need that is declared must be a real one."""
    policy = build(name, params)
    given = inputs_for(policy)
    policy.score(given)
    for field in ("queries", "accumulated", "rotary", "output_projection"):
        if getattr(given, field) is not None:
            with pytest.raises((AssertionError, AttributeError, TypeError)):
                policy.score(changed(given, **{field: None}))


@pytest.mark.parametrize(("name", "params"), ALL)
def test_scoring_while_decoding(name: str, params: dict) -> None:
    """No summary of a prompt then, but the queries of the ring, and fewer keys than positions."""
    policy = build(name, params)
    if not policy.runs_while_decoding:
        reads_places = name == "spindlekv"  # as positions, which they no longer are
        assert policy.queries is Queries.PROMPT or reads_places, "for no other reason"
        return
    given = changed(inputs_for(policy), accumulated=None, position=4000)
    if policy.queries is not Queries.NONE:
        given = changed(given, queries=make_inputs().queries)
    scores = policy.score(given)
    assert scores.shape == (2, 150) and scores.isfinite().all()


def test_keydiff_is_minus_the_cosine_with_the_mean_unit_key() -> None:
    given = inputs()
    keys = given.keys.double().numpy()
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    anchor = unit.mean(axis=1, keepdims=True)
    cosine = (keys * anchor).sum(-1) / (
        np.linalg.norm(keys, axis=-1) * np.linalg.norm(anchor, axis=-1)
    )
    found = build("keydiff", {}).score(given)
    np.testing.assert_allclose(found.numpy(), -cosine, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel_size", [1, 5, 13])
def test_snapkv_pools_the_attention_of_the_window(kernel_size: int) -> None:
    given = inputs()
    attention = loops(given.queries.double().numpy(), given.keys.double().numpy(), given.scale)
    past = attention[:, :134]
    half = kernel_size // 2
    padded = np.pad(past, ((0, 0), (half, half)))
    pooled = np.stack([padded[:, i : i + kernel_size].mean(axis=1) for i in range(134)], axis=1)
    found = build("snapkv", {"kernel_size": kernel_size}).score(given)
    np.testing.assert_allclose(found[:, :134].numpy(), pooled, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("window_score", ["mean", "top_half"])
@pytest.mark.parametrize("window_size", [8, 37])
def test_windowkv_ranks_windows_for_all_heads(window_score: str, window_size: int) -> None:
    given = inputs()
    attention = loops(given.queries.double().numpy(), given.keys.double().numpy(), given.scale)
    tokens = attention.mean(axis=0)[:134]
    expected = np.zeros(134)
    best = window_size if window_score == "mean" else window_size // 2
    for start in range(0, 134, window_size):
        values = np.sort(tokens[start : start + window_size])[::-1][:best]
        expected[start : start + window_size] = values.mean()
    found = build("windowkv", {"window_score": window_score, "window_size": window_size}).score(
        given
    )
    assert torch.equal(found[0], found[1]), "one choice for all heads"
    np.testing.assert_allclose(found[0, :134].numpy(), expected, rtol=1e-4, atol=1e-8)


def test_streaming_llm_keeps_the_most_recent() -> None:
    policy = build("streaming_llm", {})
    kept = select(policy.score(inputs())[:, :128], torch.zeros(128, dtype=torch.bool), 32)
    assert kept.tolist() == [list(range(96, 128))] * 2


def test_random_draws_per_head_layer_and_prompt() -> None:
    policy, given = build("random", {}), inputs()
    scores = policy.score(given)
    assert not torch.equal(scores[0], scores[1])
    for change in ({"layer_index": 2}, {"seed": 100}):
        assert not torch.equal(policy.score(changed(given, **change)), scores)
    assert not torch.equal(build("random", {"seed": 1}).score(given), scores)
    second_rank = changed(given, keys=given.keys[1:], first_kv_head=1)
    assert torch.equal(policy.score(second_rank), scores[1:])


def test_windowkv_agrees_over_tensor_parallel_ranks() -> None:
    """Two ranks with one KV head each must rank windows as one rank with both."""
    given = inputs()
    policy = build("windowkv", {})
    whole = policy.score(given)
    halves = [
        changed(given, keys=given.keys[r : r + 1], queries=given.queries[4 * r :][:4])
        for r in range(2)
    ]
    partial: list[torch.Tensor] = []
    for half in halves:  # what each rank brings to the sum
        policy.score(changed(half, all_reduce=lambda own: partial.append(own) or own))
    assert len(partial) == 2
    for half in halves:
        summed = changed(half, all_reduce=lambda _: sum(partial), num_ranks=2)
        torch.testing.assert_close(policy.score(summed), whole[:1], rtol=1e-4, atol=1e-8)

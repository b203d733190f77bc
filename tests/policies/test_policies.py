"""Every policy keeps the promises of the interface; formulas have files of their own."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.policies.cases import CASES
from tests.policies.helpers import changed, make_inputs, select
from vllm_kvcompress.kernels.cache_rows import DenseRows
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ChunkInputs, Queries
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

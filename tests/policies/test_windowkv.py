"""WindowKV against loops in float64, and what its presets make of a task."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.policies.helpers import attention_by_loops, changed, make_inputs, select
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.policies.inputs import Queries, ScoreInputs
from vllm_kvcompress.policies.windowkv import WindowKV

PRESETS = ["windowkv", "windowkv_llama3", "windowkv_qwen2.5"]


def windows_by_loops(given: ScoreInputs, size: int, best: int) -> np.ndarray:
    """[n - window] float64: the mean of the `best` tokens of a token's window, for all heads."""
    attention = attention_by_loops(given).mean(axis=(0, 1))
    assert given.queries is not None
    review = attention[: len(attention) - given.queries.shape[1]]
    expected = np.zeros(len(review))
    for start in range(0, len(review), size):
        values = np.sort(review[start : start + size])[::-1][:best]
        expected[start : start + size] = values.mean()
    return expected


@pytest.mark.parametrize("window_score", ["mean", "top_half"])
@pytest.mark.parametrize("window_size", [1, 8, 32, 37, 200])
@pytest.mark.parametrize("num_tokens", [17, 49, 150])
def test_a_window_is_worth_the_attention_of_its_tokens_or_of_the_better_half(
    window_score: str, window_size: int, num_tokens: int
) -> None:
    """134 review tokens are no multiple of any of these sizes but 1: the last window is short."""
    given = make_inputs(num_tokens)
    best = window_size if window_score == "mean" else max(window_size // 2, 1)
    found = WindowKV(window_score=window_score, window_size=window_size).score(given)
    assert torch.equal(found[0], found[1]), "one choice for all heads"
    expected = windows_by_loops(given, window_size, best)
    np.testing.assert_allclose(found[0, :-16].numpy(), expected, rtol=1e-4, atol=1e-8)
    assert (found[:, -16:] >= found.max()).all(), "nothing beats the observation window"


def runs(positions: list[int]) -> Iterator[int]:
    """Lengths of stretches of neighbouring positions."""
    length = 1
    for one, other in zip(positions, [*positions[1:], -2], strict=True):
        if other == one + 1:
            length += 1
        else:
            yield length
            length = 1


def test_neighbours_live_or_die_together() -> None:
    given = make_inputs(144)  # 128 tokens to review: 16 windows of 8
    scores = WindowKV(window_size=8).score(given)[:, :128]
    kept = select(scores, torch.zeros(128, dtype=torch.bool), 40)
    assert torch.equal(kept[0], kept[1])
    assert kept.shape == (2, 40) and all(length % 8 == 0 for length in runs(kept[0].tolist()))
    by_worth = np.argsort(-windows_by_loops(given, 8, 8)[::8])
    assert {position // 8 for position in kept[0].tolist()} == set(by_worth[:5].tolist())


def test_windowkv_agrees_over_tensor_parallel_ranks() -> None:
    """Two ranks with one KV head each must rank windows as one rank with both."""
    given = make_inputs()
    policy = WindowKV()
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


def test_layers_of_a_group_share_the_ranking_of_the_first() -> None:
    policy = WindowKV()
    assert policy.queries is Queries.WINDOW and policy.runs_while_decoding
    assert policy.shares_scores and policy.layers_per_ranking is None
    assert WindowKV(layers_per_leader=3).layers_per_ranking == 3
    assert not WindowKV(share_indices=False).shares_scores


def test_whole_windows_survive_only_where_all_layers_share_a_ranking() -> None:
    """Of whole blocks a draft view can be linked in place of copied: see `granularity`."""
    assert WindowKV(window_size=32).granularity == 32
    assert WindowKV(window_size=32, layers_per_leader=1).granularity == 1
    assert WindowKV(window_size=32, share_indices=False).granularity == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_follow_the_papers_text(preset: str) -> None:
    """Mean where one thing is to be found, the better half where all is to be put together."""
    config = parse_config(preset)
    assert config.policy.name == "windowkv" and config.task == "auto"
    expected = {"localization": "mean", "aggregation": "top_half"}
    for task, window_score in expected.items():
        policy = config.by_task[task].build_policy()
        assert isinstance(policy, WindowKV) and policy.window_score == window_score


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"window_size": 0}, "window_size"),
        ({"window_score": "max"}, "window_score"),
        ({"layers_per_leader": 0}, "layers_per_leader"),
    ],
)
def test_values_that_mean_nothing_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        WindowKV(**fields)

"""H2O: chunks accumulate to the attention of all prompt queries, against loops in float64."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.scores.test_prompt import loops
from tests.policies.helpers import make_inputs
from vllm_kvcompress.kernels.cache.rows import DenseRows
from vllm_kvcompress.policies.h2o import H2O
from vllm_kvcompress.policies.inputs import ChunkInputs, Queries, ScoreInputs

SPLITS = [[150], [64, 1, 37, 48], [1, 149], [16] * 9 + [6]]


def prompt_queries(given: ScoreInputs) -> torch.Tensor:
    """[8, n, 32] queries of all tokens of a hand-made request."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, given.keys.shape[1], 32, generator=generator)


def chunks(
    queries: torch.Tensor, given: ScoreInputs, sizes: list[int], **changes: Any
) -> Iterator[ChunkInputs]:
    """The prompt of a hand-made request, cut into chunks of these sizes."""
    start = 0
    for size in sizes:
        end = start + size
        fields = {
            "rows": DenseRows(
                given.keys[:, :end], given.values[:, :end], queries[:, start:end], given.scale
            ),
            "start": start,
            "prompt_len": given.keys.shape[1],
            "num_sink_tokens": given.num_sink_tokens,
            "rotary": given.rotary,
        }
        yield ChunkInputs(**{**fields, **changes})
        start = end
    assert start == given.keys.shape[1]


def accumulated(policy: H2O, queries: torch.Tensor, given: ScoreInputs, sizes: list[int]) -> Any:
    state = None
    for chunk in chunks(queries, given, sizes):
        state = policy.accumulate(state, chunk)
    return state


@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("average", [False, True])
def test_scores_are_sums_or_means_over_the_queries_that_see_a_key(
    sizes: list[int], average: bool
) -> None:
    given, policy = make_inputs(queries=None), H2O(average=average)
    queries = prompt_queries(given)
    expected = loops(queries.double().numpy(), given.keys.double().numpy(), given.scale)
    if average:
        for token in range(150):
            expected[:, token] /= 150 - token
    state = accumulated(policy, queries, given, sizes)
    found = policy.score(make_inputs(queries=None, accumulated=state))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=5e-5, atol=1e-6)


def test_the_sum_favours_early_keys_and_the_mean_does_not() -> None:
    """All keys equal: every query spreads its attention evenly over what it sees."""
    given = make_inputs(keys=torch.ones(2, 150, 32))
    state = accumulated(H2O(), prompt_queries(given), given, [150])
    sums = H2O().score(make_inputs(accumulated=state))
    assert (sums.diff(dim=1) < 0).all()
    harmonic = np.cumsum(1 / np.arange(150, 0, -1))[::-1]  # query at i gives 1 / (i + 1)
    np.testing.assert_allclose(sums[0].numpy(), harmonic, rtol=1e-4)


def test_state_has_the_promised_form_from_the_first_chunk() -> None:
    given = make_inputs()
    first = next(chunks(prompt_queries(given), given, [64, 86]))
    state = H2O().accumulate(None, first)
    assert state.shape == (2, 150)
    assert state.dtype == torch.float32
    assert not state[:, 64:].any()


def test_scores_of_one_request_do_not_touch_another() -> None:
    one, other = make_inputs(seed=1), make_inputs(seed=2)
    queries = prompt_queries(one)
    state, other_state = None, None
    pairs = zip(chunks(queries, one, [75, 75]), chunks(queries, other, [75, 75]), strict=True)
    for chunk, other_chunk in pairs:
        state = H2O().accumulate(state, chunk)
        other_state = H2O().accumulate(other_state, other_chunk)
    assert torch.equal(state, accumulated(H2O(), queries, one, [75, 75]))
    assert torch.equal(other_state, accumulated(H2O(), queries, other, [75, 75]))


def test_a_rank_with_one_head_scores_as_one_with_both() -> None:
    given = make_inputs()
    queries = prompt_queries(given)
    whole = accumulated(H2O(), queries, given, [100, 50])
    for rank in range(2):
        part = make_inputs(keys=given.keys[rank : rank + 1])
        found = accumulated(H2O(), queries[4 * rank :][:4], part, [100, 50])
        torch.testing.assert_close(found, whole[rank : rank + 1])


def test_bfloat16_prompts_accumulate_in_float32() -> None:
    given = make_inputs()
    half = make_inputs(keys=given.keys.bfloat16())
    queries = prompt_queries(given).bfloat16()
    expected = loops(queries.double().numpy(), half.keys.double().numpy(), given.scale)
    found = accumulated(H2O(), queries, half, [64, 86])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_it_reads_the_prompt_and_runs_at_its_end_only() -> None:
    assert H2O().queries is Queries.PROMPT
    assert not H2O().runs_while_decoding
    with pytest.raises(AssertionError):
        H2O().score(make_inputs())

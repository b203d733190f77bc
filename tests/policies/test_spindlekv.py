"""SpindleKV's eviction against the paper's own algorithm."""

import numpy as np
import pytest
import torch

from tests import spindlekv_paper as paper
from tests.policies.helpers import best_first, make_inputs, select
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.config.settings import LayerBudgetConfig
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.lengths.layer_budgets import SHAPES
from vllm_kvcompress.policies.spindlekv import SpindleKV, best_ranks
from vllm_kvcompress.request_options import parse_request, resolve_request


def papers_scores(given) -> np.ndarray:
    """[8, n] of the query heads; 4 of them share a KV head."""
    queries, keys = given.queries.double().numpy(), given.keys.double().numpy()
    return paper.accumulated_scores(queries, keys, given.scale)


def window_alone(num_tokens: int, window: int) -> torch.Tensor:
    """The paper forces no sinks."""
    return torch.arange(num_tokens) >= num_tokens - window


@pytest.mark.parametrize(("num_tokens", "window"), [(150, 16), (150, 1), (17, 16), (63, 32)])
def test_kv_heads_get_the_mean_of_the_papers_scores(num_tokens: int, window: int) -> None:
    given = make_inputs(num_tokens, window)
    expected = papers_scores(given).reshape(2, 4, num_tokens).mean(axis=1)
    found = SpindleKV().score(given)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("selection", ["kv_head", "union"])
def test_pooling_is_an_average_that_stops_at_the_window(selection: str) -> None:
    given = make_inputs(forced=window_alone(150, 16))
    ac = papers_scores(given)
    pooled = ac.copy()
    for head in range(8):
        for token in range(134):
            pooled[head, token] = sum(ac[head, max(token - 2, 0) : min(token + 3, 134)]) / 5
    found = SpindleKV(selection=selection, kernel_size=5).score(given).numpy()
    if selection == "kv_head":
        expected = pooled.reshape(2, 4, 150).mean(axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)
        return
    for head in range(2):
        assert best_first(found[head])[16:] == union_order(pooled[4 * head : 4 * head + 4], 134)


@pytest.mark.parametrize("k", [0, 1, 7, 60, 134])
def test_without_repetition_the_papers_tokens_stay(k: int) -> None:
    """Its k counts tokens before the window."""
    given = make_inputs(seed=3, forced=window_alone(150, 16))
    kept = paper.kept_tokens(papers_scores(given), k, 16, h_g=2, repeat=False)
    found = select(SpindleKV().score(given), given.forced, k + 16)
    assert found.tolist() == [kept[0], kept[4]]


@pytest.mark.parametrize("k", [0, 1, 7, 60, 134])
def test_a_union_of_the_papers_repeated_heads(k: int) -> None:
    """Where the budget is what the query heads' k best come to together, exactly these stay."""
    given = make_inputs(seed=3, forced=window_alone(150, 16))
    scores = SpindleKV(selection="union").score(given)
    kept = paper.kept_tokens(papers_scores(given), k, 16, h_g=2, repeat=True)
    for head in range(2):
        union = sorted(set().union(*kept[4 * head : 4 * head + 4]))
        assert k in (0, 134) or k + 16 < len(union) < 4 * k + 16, "neither trivial case"
        assert select(scores, given.forced, len(union))[head].tolist() == union


def test_a_union_for_every_budget_holds_the_largest_that_fits() -> None:
    """What is left over goes to the next ranks' tokens."""
    given = make_inputs(60, 8, forced=window_alone(60, 8))
    ac, scores = papers_scores(given), SpindleKV(selection="union").score(given)
    for head in range(2):
        unions = []
        for k in range(53):
            kept = paper.kept_tokens(ac, k, 8, h_g=2, repeat=True)[4 * head : 4 * head + 4]
            unions.append(set().union(*kept))
        for budget in range(8, 61):
            found = set(select(scores, given.forced, budget)[head].tolist())
            k = max(k for k in range(53) if len(unions[k]) <= budget)
            assert unions[k] <= found <= unions[min(k + 1, 52)]


def union_order(scores: np.ndarray, num_past: int) -> list[int]:
    """Tokens before the window, by (best rank, score there, position) over [g, n] scores."""
    keys = {}
    orders = [best_first(head[:num_past]) for head in scores]
    for token in range(num_past):
        places = [(order.index(token), -scores[i][token]) for i, order in enumerate(orders)]
        keys[token] = min(places)
    return sorted(range(num_past), key=lambda token: (*keys[token], token))


def test_unions_by_hand() -> None:
    """Head 0 likes 5, 0, 3, 2; head 1 likes 1, 5, 4, 0; token 4 wins over 3 by its score."""
    scores = torch.tensor([[[6.0, 0, 4, 5, 1, 9], [4, 8, 0, 1, 7, 7.5]]])
    free = torch.zeros(6, dtype=torch.bool)
    assert best_first(best_ranks(scores, free)[0].numpy()) == [5, 1, 0, 4, 3, 2]
    forced = free.clone()
    forced[[1, 3]] = True
    # Ranks are those among the others: head 0 likes 5, 0, 2; head 1 likes 5, 4, 0.
    assert best_first(best_ranks(scores, forced)[0].numpy()) == [1, 3, 5, 4, 0, 2]
    # Equal scores throughout: heads agree on every rank, and position decides.
    assert best_ranks(torch.ones(2, 3, 6), free).tolist() == [[5.0, 4, 3, 2, 1, 0]] * 2
    # One rank, equal scores: position decides between the heads' favourites.
    scores = torch.tensor([[[0, 0, 0, 9.0], [0, 9.0, 0, 0]]])
    assert best_first(best_ranks(scores, free[:4])[0].numpy()) == [1, 3, 0, 2]


def test_a_lone_query_head_makes_no_difference() -> None:
    rows = make_inputs().rows
    given = make_inputs(queries=rows.queries[:2])
    one, other = (SpindleKV(selection=each).score(given) for each in ("kv_head", "union"))
    for budget in (21, 64, 149):
        found, expected = (select(scores, given.forced, budget) for scores in (one, other))
        assert torch.equal(found, expected)


def test_a_union_keeps_what_the_mean_would_lose() -> None:
    """One of four query heads gives token 30 a third of its attention, and all others alike; the
    other three look at tokens 45 to 49."""
    given = make_inputs(100, 1, forced=window_alone(100, 1))
    given.rows.keys.zero_()
    given.rows.queries.zero_()
    given.rows.keys[:, 45:50, 0] = given.rows.keys[:, 30, 1] = 4 * 32**0.5
    given.rows.queries[:, :, 0] = 3.0
    given.rows.queries[3, :, 0], given.rows.queries[3, :, 1] = 0.0, 1.0
    kept = {}
    for selection in ("kv_head", "union"):
        policy = SpindleKV(selection=selection)
        kept[selection] = select(policy.score(given), given.forced, 6)[0].tolist()
    assert kept == {"kv_head": [45, 46, 47, 48, 49, 99], "union": [30, 47, 48, 49, 98, 99]}


# --- budgets and preset -----------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.05, 0.2])
@pytest.mark.parametrize("r", [0.03, 0.1, 0.2, 0.4, 0.53, 0.6, 0.8, 0.97, 1.0])
@pytest.mark.parametrize(("l", "l_w", "m"), [(1000, 32, 32), (517, 8, 5), (4096, 64, 2)])
def test_layer_budgets_are_the_papers_ratios(r: float, l: int, l_w: int, m: int, beta) -> None:  # noqa: E741
    average = int(r * l)
    if average <= l_w:  # `budgets.group_budgets` asks for no line then
        return
    config = LayerBudgetConfig(shape="linear", beta=beta)
    found = SHAPES["linear"](average, l_w, l, m, config)
    ratios = paper.layer_ratios(paper.context_ratio(average / l, l, l_w), m, beta)
    assert sum(ratios) / m == pytest.approx(paper.context_ratio(average / l, l, l_w))
    assert found == pytest.approx([l_w + ratio * (l - l_w) for ratio in ratios])
    assert all(l_w < tokens <= l + 1e-9 for tokens in found)


def test_the_papers_ratios_by_hand() -> None:
    assert paper.layer_ratios(0.3, 3) == pytest.approx([0.55, 0.3, 0.05])
    assert paper.layer_ratios(0.525, 3) == pytest.approx([1.0, 0.525, 0.05]), "both ends meet"
    assert paper.layer_ratios(0.75, 3) == pytest.approx([1.0, 0.75, 0.5])
    assert paper.layer_ratios(0.04, 2) == [0.04, 0.04]


def test_the_preset_evicts_at_the_end_of_the_prompt_alone() -> None:
    config = parse_config("spindlekv-evict")
    assert (config.policy.name, config.layer_budget.shape) == ("spindlekv", "linear")
    assert config.observation_window == 16 and config.layer_budget.beta == 0.05
    assert config.build_policy() == SpindleKV(kernel_size=21)
    with pytest.raises(ConfigError, match="spindlekv cannot compress while decoding"):
        parse_config("spindlekv-evict", {"trigger": "both"})
    extra = {"kv_compression": "spindlekv-evict", "kv_budget_ratio": 0.4}
    chosen = resolve_request(parse_config("snapkv"), parse_request(extra, 1000))
    assert (chosen.policy.name, chosen.budget.ratio) == ("spindlekv", 0.4)

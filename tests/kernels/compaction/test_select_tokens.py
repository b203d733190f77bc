"""Selection: the kernel and its torch version against Python's sort."""

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.kernels.paged import DEVICE, nan_empty
from vllm_kvcompress.kernels import torch_backend as torch_version
from vllm_kvcompress.kernels.compaction import select_tokens as kernel

VERSIONS = pytest.mark.parametrize("module", [kernel, torch_version], ids=["triton", "torch"])
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch) -> None:
    """Several tiles per row, few rows and many, and poison in what is not written."""
    nan_empty(monkeypatch)
    monkeypatch.setattr(kernel, "TILE", 32)
    monkeypatch.setattr(kernel, "LONE_TILE", 64)
    monkeypatch.setattr(kernel, "FEW_ROWS", 4)


def by_sorting(scores: list[float], forced: list[bool], num_keep: int) -> list[int]:
    """Forced first, in order; then higher scores, then earlier tokens."""
    worth = [-INF if math.isnan(score) else score for score in scores]
    order = sorted(
        range(len(scores)), key=lambda i: (not forced[i], 0.0 if forced[i] else -worth[i], i)
    )
    return sorted(order[:num_keep])


def check(module, scores, forced, num_tokens: list[int], num_keep: list[int], max_keep=None):
    """Every row of [L, R, KV, n] scores against the oracle."""
    max_keep = max(num_keep) if max_keep is None else max_keep
    counts = [torch.tensor(c, dtype=torch.int32, device=DEVICE) for c in (num_tokens, num_keep)]
    found = module.select_tokens(scores.to(DEVICE), forced.to(DEVICE), *counts, max_keep)
    assert found.shape == (*scores.shape[:3], max_keep) and found.dtype == torch.int64
    for request, (length, count) in enumerate(zip(num_tokens, num_keep, strict=True)):
        mask = forced[request, :length].tolist()
        for layer in range(scores.shape[0]):
            for head in range(scores.shape[2]):
                row = scores[layer, request, head, :length].tolist()
                expected = by_sorting(row, mask, count) + [-1] * (max_keep - count)
                assert found[layer, request, head].tolist() == expected


def one_row(module, scores: list[float], forced: list[int], num_keep: int) -> list[int]:
    """Choice in a single row, also compared with the oracle."""
    mask = torch.zeros(1, len(scores), dtype=torch.bool)
    mask[0, forced] = True
    row = torch.tensor(scores).view(1, 1, 1, -1)
    check(module, row, mask, [len(scores)], [num_keep])
    counts = [torch.tensor([c], dtype=torch.int32, device=DEVICE) for c in (len(scores), num_keep)]
    found = module.select_tokens(row.to(DEVICE), mask.to(DEVICE), *counts, num_keep)
    return found.flatten().tolist()


@st.composite
def rows(draw: st.DrawFn, values: st.SearchStrategy) -> tuple:
    """One request: scores of two heads, forced tokens, num_tokens, num_keep, max_keep."""
    n = draw(st.integers(1, 75))
    scores = draw(st.lists(values, min_size=2 * n, max_size=2 * n))
    forced = draw(st.lists(st.sampled_from([False, False, False, True]), min_size=n, max_size=n))
    num_tokens = draw(st.integers(0, n))
    num_keep = draw(st.integers(0, num_tokens))
    spare = draw(st.integers(0, 2))
    return (
        torch.tensor(scores, dtype=torch.float32).view(1, 1, 2, n),
        torch.tensor([forced]), [num_tokens], [num_keep], num_keep + spare,
    )  # fmt: skip


FEW = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0, INF, -INF, NAN])
"""Few distinct values: ties are the interesting case."""
ANY = st.floats(width=32)
"""Also subnormal numbers, and NaN of either sign."""
QUICK = settings(
    max_examples=40,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes here
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@VERSIONS
@QUICK
@given(case=rows(FEW))
def test_ties_match_sorting(module, case: tuple) -> None:
    check(module, *case)


@VERSIONS
@QUICK
@given(case=rows(ANY))
def test_any_numbers_match_sorting(module, case: tuple) -> None:
    check(module, *case)


@VERSIONS
@pytest.mark.parametrize("size", [1, 31, 32, 33, 63, 64, 111])
def test_edges_of_tiles(module, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    scores = torch.randn(1, 2, 1, size, generator=generator)
    forced = torch.rand(2, size, generator=generator) < 0.1
    check(module, scores, forced, [size, size], [size, (size + 1) // 2])


@VERSIONS
def test_ragged_batches_of_layers_and_heads(module) -> None:
    """What lies behind a request's tokens beats all of them, and must not be looked at."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_keep = [70, 1, 33, 0, 64], [20, 1, 33, 0, 0]
    scores = torch.randint(-9, 9, (2, 5, 3, 70), generator=generator) / 4
    forced = torch.rand(5, 70, generator=generator) < 0.1
    for request, length in enumerate(num_tokens):
        scores[:, request, :, length:] = INF
        forced[request, length:] = True
    check(module, scores, forced, num_tokens, num_keep)
    check(module, scores, forced, num_tokens, num_keep, max_keep=80)


@VERSIONS
def test_strides_are_free(module) -> None:
    """One score per token for all layers and requests; slices of larger tensors; heads apart."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(3, 90, generator=generator)
    forced = torch.zeros(2, 100, dtype=torch.bool)[:, :90]
    forced[1, 80:] = True
    check(module, base.expand(2, 2, 3, 90), forced, [90, 85], [30, 7])
    large = torch.randn(2, 4, 2, 120, generator=generator)
    check(module, large.transpose(1, 2)[:, :, 1:3, 9:99], forced, [90, 85], [30, 7])


@VERSIONS
def test_every_digit_of_a_float_decides(module) -> None:
    """Neighbouring floats: the rows differ only in the highest, ..., the lowest 8 bits."""
    for shift in (0, 8, 16):
        bits = 0x3F800000 + (torch.arange(50).flip(0) << shift)
        assert one_row(module, bits.int().view(torch.float32).tolist(), [], 7) == list(range(7))
    powers = [2.0 ** (-i) for i in range(40)] + [-(2.0**i) for i in range(40)]
    assert one_row(module, powers, [], 60) == list(range(60))


@VERSIONS
def test_special_numbers_by_hand(module) -> None:
    assert one_row(module, [NAN, INF, 1.0, 0.0], [3], 1) == [3], "+inf does not beat forced"
    assert one_row(module, [NAN, INF, 1.0, 0.0], [3], 3) == [1, 2, 3]
    assert one_row(module, [1.0, NAN, 2.0], [1], 1) == [1], "forced whatever the score"
    assert one_row(module, [NAN, -INF, NAN, -INF], [], 2) == [0, 1], "NaN equals -inf"
    assert one_row(module, [-INF, -3e38, NAN], [], 1) == [1]
    assert one_row(module, [3.4e38, INF, 3.4e38], [], 1) == [1]
    assert one_row(module, [-0.0, 0.0, -0.0, 0.0], [], 2) == [0, 1], "-0.0 equals 0.0"
    assert one_row(module, [0.0, 1e-45, -1e-45, -0.0], [], 3) == [0, 1, 3]
    assert one_row(module, [9.0] * 40 + [8.0] * 40, list(range(3, 80, 7)), 2) == [3, 10]


@VERSIONS
def test_all_equal_scores_keep_the_earliest(module) -> None:
    assert one_row(module, [0.25] * 100, [99], 50) == [*range(49), 99]


@VERSIONS
def test_refuses_what_does_not_fit(module) -> None:
    counts = torch.ones(2, dtype=torch.int32, device=DEVICE)
    forced = torch.zeros(2, 8, dtype=torch.bool, device=DEVICE)
    scores = torch.zeros(1, 2, 3, 8, device=DEVICE)
    with pytest.raises(ValueError, match="does not fit scores"):
        module.select_tokens(scores[:, :1], forced, counts, counts, 1)
    with pytest.raises(ValueError, match="must be float32, forced bool"):
        module.select_tokens(scores.half(), forced, counts, counts, 1)
    with pytest.raises(ValueError, match="neighbours"):
        module.select_tokens(scores.mT.contiguous().mT, forced, counts, counts, 1)


def test_nothing_to_keep_gives_an_empty_answer() -> None:
    forced = torch.zeros(2, 8, dtype=torch.bool)
    check(kernel, torch.zeros(1, 2, 3, 8), forced, [8, 8], [0, 0])


def sm90_launches() -> None:
    """32 layers and 8 KV heads of two requests, and a layer alone."""
    counts = torch.ones(2, dtype=torch.int32)
    for num_layers, n in ((32, 4096), (32, 1001), (1, 4096)):
        scores = torch.zeros(num_layers, 2, 8, n)
        kernel.select_tokens(scores, torch.zeros(2, n, dtype=torch.bool), counts, counts, 100)

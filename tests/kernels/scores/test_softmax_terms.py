"""Soft caps and learned sinks in scores: kernels and torch versions against loops in float64."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.kernels import torch_versions as torch_version
from tests.kernels.paged import DEVICE, nan_empty, random_pages
from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms
from vllm_kvcompress.kernels.scores import heads, prompt, softmax_sums, window

KERNELS = SimpleNamespace(
    token_scores=window.token_scores,
    window_scores=window.window_scores,
    head_scores=heads.head_scores,
    prompt_attention_sums=prompt.prompt_attention_sums,
)
VERSIONS = pytest.mark.parametrize("module", [KERNELS, torch_version], ids=["triton", "torch"])
SCALE, WINDOW, HEADS = 0.5, 5, 8
SINKS = [3.0, -2.0, 0.5, 9.0, -30.0, 1.0, 2.0, -1.0]
TERMS = {
    "cap": (4.0, None),
    "sinks": (0.0, SINKS),
    "both": (2.5, SINKS),
    "high cap": (500.0, None),
}
CASES = pytest.mark.parametrize(("cap", "sinks"), TERMS.values(), ids=list(TERMS))


@pytest.fixture(autouse=True)
def _poison(monkeypatch) -> None:
    nan_empty(monkeypatch)


def attention(
    queries: torch.Tensor, keys: torch.Tensor, cap: float, sinks: list[float] | None
) -> torch.Tensor:
    """[w, H, D] and [KV, n, D] -> [H, w, n] float64, number by number."""
    num_queries, num_heads, _ = queries.shape
    num_kv_heads, length, _ = keys.shape
    found = torch.zeros(num_heads, num_queries, length, dtype=torch.float64)
    for head in range(num_heads):
        for i in range(num_queries):
            row = []
            for j in range(length - num_queries + i + 1):
                key = keys[head // (num_heads // num_kv_heads), j]
                logit = float(torch.dot(queries[i, head].double().cpu(), key)) * SCALE
                row.append(cap * math.tanh(logit / cap) if cap else logit)
            rest = [] if sinks is None else [sinks[head]]
            top = max(row + rest)
            total = sum(math.exp(each - top) for each in row + rest)
            for j, each in enumerate(row):
                found[head, i, j] = math.exp(each - top) / total
    return found


def terms_of(cap: float, sinks: list[float] | None, dtype=torch.bfloat16) -> SoftmaxTerms:
    """As a layer holds them: sinks in the weights' type."""
    return SoftmaxTerms(cap, None if sinks is None else torch.tensor(sinks, dtype=dtype).to(DEVICE))


def make_case(lengths: list[int], dtype=torch.float32):
    pages, keys, _ = random_pages(lengths, 2, 32, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    shape = (len(lengths), WINDOW, HEADS, 32)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE), pages, keys


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float = 5e-5) -> None:
    torch.testing.assert_close(found.cpu().double(), expected, rtol=rtol, atol=1e-7)


@VERSIONS
@CASES
def test_every_score_against_loops(module, cap: float, sinks) -> None:
    queries, pages, keys = make_case([6, 70])
    terms = terms_of(cap, sinks)
    by_token = module.token_scores(queries, pages, SCALE, terms)
    by_head = module.head_scores(queries, pages, SCALE, terms)
    by_window = module.window_scores(queries, pages, SCALE, 16, terms)
    sums = module.prompt_attention_sums(queries, pages, SCALE, terms)
    for request, own in enumerate(keys):
        exact, length = attention(queries[request], own, cap, sinks), own.shape[1]
        grouped = exact.unflatten(0, (2, HEADS // 2))
        close(by_head[request, :, :length], exact.mean(1))
        close(by_token[request, :, :length], grouped.mean((1, 2)))
        close(sums[request, :, :length], grouped.mean(1).sum(1))
        review = length - WINDOW
        for number in range(-(-review // 16)):
            part = grouped[..., 16 * number : min(16 * number + 16, review)]
            close(by_window[request, :, number], part.mean((1, 2, 3)))


@VERSIONS
def test_many_rows_splits_and_bfloat16(module, monkeypatch) -> None:
    monkeypatch.setattr("vllm_kvcompress.kernels.common.TARGET_PROGRAMS", 8)
    monkeypatch.setattr(softmax_sums, "_TILE", 16)
    queries, pages, keys = make_case([90, 33], torch.bfloat16)
    found = module.token_scores(queries, pages, SCALE, terms_of(3.0, SINKS))
    for request, own in enumerate(keys):
        exact = attention(queries[request], own, 3.0, SINKS)
        expected = exact.unflatten(0, (2, HEADS // 2)).mean((1, 2))
        close(found[request, :, : own.shape[1]], expected, rtol=1e-3)


@VERSIONS
def test_rows_lack_what_sinks_take(module) -> None:
    queries, pages, _ = make_case([40])
    whole = module.head_scores(queries, pages, SCALE, PLAIN).sum(2)
    torch.testing.assert_close(whole, torch.ones_like(whole))
    rest = module.head_scores(queries, pages, SCALE, terms_of(0.0, SINKS)).sum(2)
    assert (rest < 1).all() and rest[0, 3] < 0.2 and rest[0, 4] > 0.999


def test_a_layer_without_them_is_compiled_and_launched_as_ever(monkeypatch) -> None:
    """No cap is compiled in, and nothing is launched for sinks."""
    assert softmax_sums.cap_of(PLAIN) == {"CAP": 0.0}
    queries, pages, _ = make_case([40])
    monkeypatch.setattr(torch, "logaddexp2", None)
    window.token_scores(queries, pages, SCALE)
    with pytest.raises(TypeError):
        window.token_scores(queries, pages, SCALE, terms_of(0.0, SINKS))


def test_of_heads_and_strongest() -> None:
    terms = SoftmaxTerms(2.0, torch.tensor(SINKS))
    own = terms.of_heads(2, 4)
    assert own.sinks is not None and own.sinks.tolist() == [0.5, 9.0] and own.soft_cap == 2.0
    strongest = own.strongest().sinks
    assert strongest is not None and strongest.tolist() == [9.0]
    assert PLAIN.of_heads(0, 1) is PLAIN and replace(terms, sinks=None).strongest().sinks is None

"""Scores of query heads over paged keys: both versions against loops in float64."""

import pytest
import torch

from tests.kernels import torch_versions as torch_version
from tests.kernels.paged import DEVICE, nan_empty, random_pages
from tests.kernels.scores.test_window import loops, make_queries
from vllm_kvcompress.kernels.cache.paged_rows import PagedBatch
from vllm_kvcompress.kernels.cache.rows import DenseRows
from vllm_kvcompress.kernels.scores import heads as kernel

VERSIONS = pytest.mark.parametrize("module", [kernel, torch_version], ids=["triton", "torch"])


@pytest.fixture(autouse=True)
def _poison(monkeypatch) -> None:
    nan_empty(monkeypatch)


def by_head(queries: torch.Tensor, keys: list[torch.Tensor], scale: float) -> list[torch.Tensor]:
    """Per request [H, n] float64: a KV head of its own for each query head."""
    repeated = [k.repeat_interleave(queries.shape[2] // len(k), dim=0) for k in keys]
    return loops(queries, repeated, scale)


def check(module, queries, pages, keys, scale=0.3, rtol=2e-5) -> None:
    found = module.head_scores(queries, pages, scale).cpu().double()
    assert found.shape == (len(keys), queries.shape[2], pages.max_tokens)
    for request, expected in enumerate(by_head(queries, keys, scale)):
        length = expected.shape[1]
        torch.testing.assert_close(found[request, :, :length], expected, rtol=rtol, atol=1e-7)
        assert (found[request, :, length:] == 0).all(), "padding is zero"


@VERSIONS
@pytest.mark.parametrize("lengths", [[4], [16, 17], [129, 15, 111]])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)], ids=["1:1", "3:1", "8:1"])
def test_ragged_batches_and_head_shapes(module, lengths, heads: tuple[int, int]) -> None:
    pages, keys, _ = random_pages(lengths, heads[1], 32)
    check(module, make_queries(len(lengths), 3, heads[0], 32), pages, keys)


@VERSIONS
@pytest.mark.parametrize(
    ("query_dtype", "key_dtype", "key_scale"),
    [(torch.bfloat16, torch.bfloat16, 1.0), (torch.float16, torch.float8_e4m3fn, 0.37)],
)
def test_dtypes(module, query_dtype, key_dtype, key_scale: float) -> None:
    pages, keys, _ = random_pages([70, 33], 2, 64, dtype=key_dtype, key_scale=key_scale)
    check(module, make_queries(2, 4, 8, 64, query_dtype), pages, keys, 64**-0.5, 1e-4)


@VERSIONS
def test_queries_may_be_a_strided_view(module) -> None:
    pages, keys, _ = random_pages([50])
    stash = torch.randn(3, 4, 9, 64, device=DEVICE)
    check(module, stash[:1].transpose(1, 2)[:, :4], pages, keys)


@VERSIONS
def test_refuses_what_does_not_fit(module) -> None:
    pages, _, _ = random_pages([20, 20])
    with pytest.raises(ValueError, match="do not fit 2 requests"):
        module.head_scores(make_queries(3, 2, 4, 64), pages, 1.0)
    with pytest.raises(ValueError, match="no multiple of 2 KV heads"):
        module.head_scores(make_queries(2, 2, 3, 64), pages, 1.0)


def test_rows_in_place_and_rows_in_copies_agree() -> None:
    """The last 2 of 5 queries; the mean over a KV head's query heads is what `attention` says."""
    pages, keys, values = random_pages([40, 23])
    queries = make_queries(2, 5, 8, 64)
    batch = PagedBatch(pages, [40, 23], queries, 0.3)
    for request, row in enumerate(batch.rows()):
        own = queries[request].transpose(0, 1)
        copies = [each[request].float().to(DEVICE) for each in (keys, values)]
        dense = DenseRows(*copies, own, 0.3)
        expected = by_head(queries[:, 3:], keys, 0.3)[request]
        for rows in (row, dense):
            found = rows.head_attention(2)
            torch.testing.assert_close(found.cpu().double(), expected, rtol=2e-5, atol=1e-7)
            mean = found.unflatten(0, (2, 4)).mean(dim=1)
            torch.testing.assert_close(rows.attention(2), mean, rtol=2e-5, atol=1e-7)


def test_one_launch_serves_all_requests(monkeypatch) -> None:
    from vllm_kvcompress.kernels.cache import paged_rows

    launched = []
    monkeypatch.setattr(
        paged_rows, "head_scores", lambda *a: launched.append(a) or kernel.head_scores(*a)
    )
    pages, _, _ = random_pages([40, 23])
    for row in PagedBatch(pages, [40, 23], make_queries(2, 5, 8, 64), 0.3).rows():
        row.head_attention(5)
    assert len(launched) == 1


def sm90_launches() -> None:
    """Llama-3-8B's shapes, with one query head per KV head in each of four turns."""
    pages, _, _ = random_pages([64], 8, 128, dtype=torch.bfloat16)
    kernel.head_scores(make_queries(1, 32, 32, 128, torch.bfloat16), pages, 0.1)

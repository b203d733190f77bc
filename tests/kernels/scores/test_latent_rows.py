"""Latent attention (MLA): one row of 576 numbers for all heads, measured by the same kernels.

The oracle knows nothing of absorbed queries: it makes every head's keys of the latents, in float64,
and attends with the head's own queries.
"""

import pytest
import torch

from tests.kernels import torch_versions as torch_version
from tests.kernels.paged import DEVICE, fill, make_cache
from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.scores import keys as key_kernel
from vllm_kvcompress.kernels.scores import redundancy
from vllm_kvcompress.kernels.scores import window as kernel
from vllm_kvcompress.worker.layout.latent import absorb

LATENT, ROTATED, NOPE, BLOCK = 512, 64, 32, 16
WIDTH = LATENT + ROTATED
VERSIONS = pytest.mark.parametrize("module", [kernel, torch_version], ids=["triton", "torch"])


def latent_pages(
    lengths: list[int], dtype: torch.dtype = torch.float32
) -> tuple[Pages, list[torch.Tensor]]:
    """Pages of a latent cache, and its rows [n, WIDTH] in float64."""
    generator = torch.Generator().manual_seed(0)
    counts = [-(-length // BLOCK) for length in lengths]
    cache = make_cache(sum(counts) + 1, 1, BLOCK, WIDTH, dtype)[0]
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    rows, first = [], 1
    for request, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own = torch.randn(1, length, WIDTH, generator=generator).to(dtype)
        blocks = list(range(first, first + count))
        fill(cache, blocks, own.to(DEVICE))
        table[request, :count] = torch.tensor(blocks)
        rows.append(own[0].double())
        first += count
    counted = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    pages = Pages(cache, cache[..., :LATENT], table.to(DEVICE), counted, max(lengths))
    return pages, rows


def head_attention(
    query: torch.Tensor, rows: torch.Tensor, up_keys: torch.Tensor, scale: float
) -> torch.Tensor:
    """Mean over heads and queries [n] float64, from every head's own keys.

    Of queries [H, w, NOPE + ROTATED], rows [n, WIDTH] and projections [H, NOPE, LATENT].
    """
    num_heads, window, _ = query.shape
    total = torch.zeros(len(rows), dtype=torch.float64)
    for head in range(num_heads):
        keys = torch.cat([rows[:, :LATENT] @ up_keys[head].T, rows[:, LATENT:]], dim=1)
        for place in range(window):
            seen = len(rows) - window + place + 1
            logits = keys[:seen] @ query[head, place] * scale
            total[:seen] += logits.softmax(0) / (num_heads * window)
    return total


@VERSIONS
def test_absorbed_queries_pay_the_attention_of_all_heads(module) -> None:
    generator = torch.Generator().manual_seed(1)
    pages, rows = latent_pages([40, 130])
    queries = torch.randn(2, 8, 4, NOPE + ROTATED, generator=generator)
    up_keys = torch.randn(8, NOPE, LATENT, generator=generator) / LATENT**0.5
    absorbed = torch.stack([absorb(each, up_keys) for each in queries]).transpose(1, 2)
    found = module.token_scores(absorbed.to(DEVICE), pages, 0.3).cpu().double()
    means = module.window_scores(absorbed.to(DEVICE), pages, 0.3, 16).cpu().double()
    for request, own in enumerate(rows):
        expected = head_attention(queries[request].double(), own, up_keys.double(), 0.3)
        length = len(own)
        torch.testing.assert_close(found[request, 0, :length], expected, rtol=2e-4, atol=1e-7)
        assert (found[request, 0, length:] == 0).all()
        first = expected[: min(16, length - 4)].mean()
        torch.testing.assert_close(means[request, 0, 0], first, rtol=2e-4, atol=1e-7)


def test_a_row_is_a_key() -> None:
    pages, rows = latent_pages([40, 130])
    found = key_kernel.key_similarity(pages).cpu().double()
    for request, own in enumerate(rows):
        units = own / own.norm(dim=1, keepdim=True)
        expected = torch.cosine_similarity(own, units.mean(0)[None], dim=1)
        torch.testing.assert_close(found[request, 0, : len(own)], expected, rtol=1e-4, atol=1e-6)


def sm90_launches() -> None:
    """DeepSeek V2 Lite's shapes."""
    pages, _ = latent_pages([64], torch.bfloat16)
    queries = torch.zeros(1, 32, 16, WIDTH, dtype=torch.bfloat16, device=DEVICE)
    kernel.token_scores(queries, pages, 0.1)
    kernel.window_scores(queries, pages, 0.1, 32)
    key_kernel.key_similarity(pages)
    redundancy.key_redundancy(pages, 0.5)

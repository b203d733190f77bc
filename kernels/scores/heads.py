"""Attention that the last tokens of each request pay to all of it, for every query head alone.

    head_scores[h, j] = mean over the w queries of A[h, i, j],  A as in `scores.window`

The kernels of `scores.window` average over the query heads of a KV head. They are handed every
request g times here, in turns with one query head of every KV head: three launches, as there, and g
times as many reads of the keys.

Dimensions: R requests, H query heads, KV key-value heads, g = H / KV, w queries, D head_dim.
"""

from dataclasses import replace

import torch

from vllm_kvcompress.kernels.cache.checks import check_window
from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms
from vllm_kvcompress.kernels.scores.window import token_scores


def head_scores(
    queries: torch.Tensor, pages: Pages, scale: float, terms: SoftmaxTerms = PLAIN
) -> torch.Tensor:
    """Mean attention per query head and token, for a ragged batch of requests.

    Parameters
    ----------
    queries, pages, scale, terms
        As for `scores.window.token_scores`.

    Returns
    -------
    torch.Tensor
        [R, H, max_tokens] float32; zero from a request's length on, else each row adds up to 1,
        less what sinks take.

    Raises
    ------
    ValueError
        If queries and pages do not fit.
    """
    check_window(queries, pages.num_requests, pages.num_kv_heads, pages.head_dim)
    grouped = queries.unflatten(2, (pages.num_kv_heads, -1))  # [R, w, KV, g, D]
    group = grouped.shape[3]
    alone = grouped.permute(0, 3, 1, 2, 4).flatten(0, 1)  # [R * g, w, KV, D]
    repeated = replace(
        pages,
        block_table=pages.block_table.repeat_interleave(group, dim=0),
        num_tokens=pages.num_tokens.repeat_interleave(group),
    )
    if terms.sinks is not None:
        own = terms.sinks.view(pages.num_kv_heads, group).T  # [g, KV]
        terms = replace(terms, sinks=own.repeat(pages.num_requests, 1))
    scores = token_scores(alone, repeated, scale, terms).unflatten(0, (-1, group))  # [R, g, KV, n]
    return scores.transpose(1, 2).flatten(1, 2)

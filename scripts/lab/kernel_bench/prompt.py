"""Cases of the kernel benchmark that need more than torch and triton.

`whole_prompt` imports the worker (and so vLLM) and `paged_attention` xformers, when called.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from lab.kernel_bench import inputs
from lab.kernel_bench.inputs import Case, Shape


def paged_attention(shape: Shape, generator: torch.Generator) -> Case:
    """A decode step over a compacted cache: xformers on its pages, torch on gathered survivors.

    Survivors are gathered from where they were before the compaction. Pages have 64 tokens, the
    fewest that all of xformers' operators take.
    """
    from xformers.ops import fmha

    from vllm_kvcompress.kernels.cache.layer_caches import LayerCaches
    from vllm_kvcompress.kernels.compaction.compact_pages import compact_pages

    shape = replace(shape, layers=1, block=64, layout="LBNHC", ragged=False)
    cache, chosen = inputs.make_cache(shape, generator), inputs.random_survivors(shape, generator)
    layers = LayerCaches.of(cache.layers, shape.head_dim)
    compact_pages(layers, cache.table, cache.destination, chosen, cache.num_keep)
    pages, group = cache.pages(), shape.heads // shape.kv_heads
    index = chosen[0, ..., None].expand(-1, -1, -1, shape.head_dim)  # [R, KV, K, D]
    keys, values = (
        torch.stack([read(r, shape.tokens) for r in range(shape.batch)]).gather(2, index)
        for read in (pages.gather_keys, pages.gather_values)
    )
    queries = inputs.random_queries(shape, generator, shape.batch)  # [R, H, D]
    bias = fmha.attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * shape.batch,
        kv_seqlen=[shape.kept] * shape.batch,
        block_tables=cache.destination,
        page_size=shape.block,
        device=generator.device,
    )
    # [1, slots, KV, g, D]: the query heads of a KV head share its rows by a stride of 0.
    rows = [
        half.transpose(1, 2).flatten(0, 1)[None, :, :, None].expand(-1, -1, -1, group, -1)
        for half in (pages.keys, pages.values)
    ]
    grouped = queries.unflatten(1, (shape.kv_heads, group))[None]
    attend = fmha.memory_efficient_attention_forward
    return Case(
        lambda: attend(grouped, *rows, attn_bias=bias, scale=shape.scale),
        lambda: scaled_dot_product_attention(
            queries[:, :, None], keys, values, scale=shape.scale, enable_gqa=True
        ),
        outputs=lambda out: [out.reshape(queries.shape)],
    )


def whole_prompt(shape: Shape, generator: torch.Generator, preset: str) -> Case:
    """All that is done for one prompt: `Compactor.run` on all layers, kept at 12 %.

    The torch version scores and selects from gathered copies. Two ways to add up numbers may rank
    neighbours differently, so survivors are compared as sets; that the rows behind them were
    copied, bit for bit, is compared exactly.
    """
    from vllm_kvcompress.config.reading import parse_config
    from vllm_kvcompress.kernels.compaction import select_tokens
    from vllm_kvcompress.kernels.compaction.gather_rows import gather_rows
    from vllm_kvcompress.lengths.budgets import (
        compaction_lengths,
        forced_ranges,
        layer_groups,
        permanent_ranges,
    )
    from vllm_kvcompress.plans import CompactionPlan, GroupCache, GroupPlan
    from vllm_kvcompress.request_options import parse_request, resolve_request
    from vllm_kvcompress.worker.batch import CompactionJob
    from vllm_kvcompress.worker.compaction.compactor import Compactor, QuerySources
    from vllm_kvcompress.worker.layout.base import CacheLayout
    from vllm_kvcompress.worker.layout.layer_cache import LayerCache
    from vllm_kvcompress.worker.layout.strided import StridedLayout

    class InPlace(StridedLayout):
        """Remembers what moved."""

        def move(self, caches: Any, group: Any, indices: torch.Tensor, rotary: Any) -> None:
            moved[caches[0].data_ptr()] = indices
            super().move(caches, group, indices, rotary)

    class Gathered(StridedLayout):
        """As layouts that no kernel can address: torch on gathered copies."""

        rows = CacheLayout.rows

        def move(self, caches: Any, group: Any, indices: torch.Tensor, rotary: Any) -> None:
            moved[caches[0].data_ptr()] = indices
            CacheLayout.move(self, caches, group, indices, rotary)

    class Sources:
        """Queries of every layer's window."""

        def take(self, request_id: str, layer: str, end: int) -> torch.Tensor:
            return queries[int(layer)]

    server = parse_config({"preset": preset, "budget": {"ratio": inputs.KEPT}})
    assert server is not None
    config = resolve_request(server, parse_request({}), "localization")
    assert config is not None
    n, size = shape.tokens, shape.block
    numbers = layer_groups(shape.layers, config.layer_groups)
    lengths = compaction_lengths(n, config, max(numbers) + 1, size)
    most = max(each.kept_len for each in lengths if each)
    table, destination = inputs.scattered_tables([[-(-n // size)], [most // size]], generator)
    source, targets = (tuple(each[0].tolist()) for each in (table, destination))
    caches = list(inputs.storage(shape, len(source) + len(targets), generator))
    window = config.observation_window
    queries = [
        inputs.random_queries(shape, generator, window).transpose(0, 1) for _ in range(shape.layers)
    ]
    held = GroupCache(n, permanent_ranges(n, config))
    plans = tuple(
        GroupPlan(
            each, held, forced_ranges(held, window), source[: each.region_len // size],
            targets[: each.kept_len // size], source[each.region_len // size :],
        )
        if each
        else None
        for each in lengths
    )  # fmt: skip
    jobs = [CompactionJob(CompactionPlan("prompt", n, False, 0, plans), config, 0)]
    moved: dict[int, torch.Tensor] = {}

    def compactor(layout: StridedLayout) -> Compactor:
        layers = [
            LayerCache(str(i), i, number, shape.scale, layout, lambda i=i: caches[i])  # type: ignore[misc]
            for i, number in enumerate(numbers)
        ]
        sources: Any = QuerySources(Sources(), Sources(), Sources())  # type: ignore[arg-type]
        return Compactor(layers, shape.layers, sources, generator.device, lambda x: x, 1, 0)

    def outputs(_: Any) -> list[torch.Tensor]:
        """Per layer a mask of survivors, and whether their rows are in the new blocks."""
        plain, found, layer = StridedLayout(shape.head_dim, size), [], 0
        for indices in moved.values():  # [L, 1, KV, K] of a group
            new = destination[0, : indices.shape[3] // size].long()
            for chosen in indices[:, 0]:
                mask = torch.zeros(shape.kv_heads, n, dtype=torch.bool, device=chosen.device)
                found.append(mask.scatter_(1, chosen, True))
                copies = plain.read(caches[layer], new)
                originals = plain.read(caches[layer], table[0].long())
                same = [
                    torch.equal(copy, gather_rows(original, chosen))
                    for copy, original in zip(copies, originals, strict=True)
                ]
                found.append(torch.tensor([all(same)]))
                layer += 1
        return found

    kernel = compactor(InPlace(shape.head_dim, size))
    kernel.select_tokens = select_tokens.select_tokens
    other = compactor(Gathered(shape.head_dim, size))
    blocks = destination[0].long()
    return Case(
        lambda: kernel.run(jobs),
        lambda: other.run(jobs),
        outputs,
        spoil=lambda: [cache.index_fill_(0, blocks, float("nan")) for cache in caches],
    )

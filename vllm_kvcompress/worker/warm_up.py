"""Runs a compaction before the server takes requests, so that none waits for Triton's compiler.

Compiling a kernel takes seconds, at its first launch. The made-up request lies in the null block
(number 0), which holds nobody's tokens.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.kernels.cache.block_tables import BlockTables
from vllm_kvcompress.kernels.codebook.build import COVER_BLOCKS
from vllm_kvcompress.kernels.dispatch import backend_of
from vllm_kvcompress.plans import BookLengths, CompactionPlan, GroupCache, GroupLengths, GroupPlan
from vllm_kvcompress.policies.inputs import ChunkInputs, Queries
from vllm_kvcompress.worker.compactor import Compactor, QuerySources
from vllm_kvcompress.worker.group_batch import CompactionJob
from vllm_kvcompress.worker.query_ring import QueryRing
from vllm_kvcompress.worker.state import CompressionState


class _NoQueries:
    """Zeros in the place of queries; one of these stands for all three sources."""

    def __init__(
        self, compactor: Compactor, config: CompressionConfig, num_tokens: int,
        queries: Mapping[str, torch.Tensor],
    ) -> None:  # fmt: skip
        self.layers = {layer.name: layer for layer in compactor.layers}
        self.config, self.num_tokens, self.queries = config, num_tokens, queries

    def take(self, request: Any, layer_name: str, *window: int) -> Any:
        """Queries [num_heads, w, head_dim], or the policy's summary of a prompt of zeros."""
        sample, policy = self.queries[layer_name], self.config.build_policy()
        if policy.queries is not Queries.PROMPT:
            return sample.new_zeros(self.config.observation_window, *sample.shape).transpose(0, 1)
        layer = self.layers[layer_name]
        cache, queries = layer.cache(), sample.new_zeros(self.num_tokens, *sample.shape)
        blocks = torch.zeros(
            self.num_tokens // cache.shape[2], dtype=torch.int32, device=cache.device
        )
        chunk = ChunkInputs(
            rows=layer.layout.rows_so_far(
                cache, blocks, self.num_tokens, queries.transpose(0, 1), layer.scale
            ),
            start=0,
            prompt_len=self.num_tokens,
            num_sink_tokens=self.config.num_sink_tokens,
            rotary=layer.rotary if policy.needs_rotary else None,
        )
        return policy.accumulate(None, chunk)


def warm_up_steps(
    lengths: CompressionState,
    ring: QueryRing,
    physical_slots: Callable[..., None],
    tables: BlockTables,
    slot_mappings: torch.Tensor,
) -> None:
    """Launch what every step launches around its forward pass, for a batch of one dummy.

    Parameters
    ----------
    lengths : CompressionState
        Evicted tokens of all rows.
    ring : QueryRing
        Last queries of all rows.
    physical_slots : callable
        `kernels.cache.step_slots.physical_slots`.
    tables : BlockTables
        Of the G KV cache groups.
    slot_mappings : torch.Tensor
        [G, tokens] int64, of which nothing is written.
    """
    device = slot_mappings.device
    one = torch.ones(1, dtype=torch.int64, device=device)
    batch: Any = SimpleNamespace(
        num_tokens=1, positions=one - 1, query_start_loc=torch.cat([one - 1, one]).int(),
        seq_lens=one.int(), idx_mapping=-one, idx_mapping_np=np.array([-1]),
    )  # fmt: skip
    lengths.begin_batch(batch)
    ring.assign(-1, 0)  # a row must record, or nothing is launched
    ring.begin_batch(batch)
    ring.end_batch()
    ring.assign(-1, -1)
    physical_slots(
        positions=batch.positions, query_start_loc=batch.query_start_loc,
        idx_mapping=batch.idx_mapping, evicted=lengths.evicted.gpu, tables=tables,
        out=slot_mappings,
    )  # fmt: skip


def _warm_up_books(compactor: Compactor, config: CompressionConfig) -> None:
    """Make books of zeros in every size that the kernels tell apart."""
    assert config.codebook is not None
    build = backend_of(compactor.device).build_codebook
    cache = compactor.layers[0].cache()
    for size in COVER_BLOCKS:
        vectors = cache.new_zeros(1, size, cache.shape[3] // 2)
        counts = torch.full((1,), size, dtype=torch.int32, device=compactor.device)
        for threshold in {config.codebook.key_threshold, config.codebook.value_threshold}:
            build(vectors, counts, threshold, max_entries=1)


def warm_up(
    compactor: Compactor,
    configs: Iterable[CompressionConfig],
    block_size: int,
    queries: Mapping[str, torch.Tensor],
) -> None:
    """Compact a request that nobody made, once per setting.

    Parameters
    ----------
    compactor : Compactor
        The rank's compactor.
    configs : iterable of CompressionConfig
        The server's setting and its variants; what a request names on its own is compiled when it
        comes.
    block_size : int
        Tokens per block.
    queries : mapping of str to torch.Tensor
        Per layer an example [num_heads, head_dim] of a query.
    """
    num_groups = max(layer.group for layer in compactor.layers) + 1
    for config in configs:
        protected = config.num_sink_tokens + config.observation_window
        num_blocks = -(-protected // block_size) + 2
        length = num_blocks * block_size
        spans = ((0, config.num_sink_tokens), (length - config.observation_window, length))
        lengths = [GroupLengths(length, length - block_size)]
        caches = [GroupCache(length, spans[:1])]
        if config.codebook is not None:
            # The null block is entries, codes and tokens at once. What of it is read means nothing.
            book = BookLengths(block_size, block_size, block_size)
            lengths += [
                GroupLengths(length, book.num_slots, book),
                GroupLengths(length, book.num_slots, book, 1, book.num_slots),
            ]
            _warm_up_books(compactor, config)
            caches += [caches[0], GroupCache(length, (), replace(book, num_tokens=1))]
        own = copy.copy(compactor)
        source: Any = _NoQueries(compactor, config, length, queries)
        own.sources = QuerySources(source, source, source)
        for each, cache in zip(lengths, caches, strict=True):
            num_kept = each.kept_len // block_size
            blocks = (0,) * num_blocks, (0,) * num_kept
            group = GroupPlan(each, cache, spans, *blocks, tail_blocks=())
            plan = CompactionPlan("warm-up", length, False, 0, (group,) * num_groups)
            own.run([CompactionJob(plan, config, 0)])
        own.codebooks.take_measures()  # nobody's

"""Runs a compaction before the server takes requests, so that none waits for Triton's compiler.

Compiling a kernel takes seconds, at its first launch. The made-up request lies in the null block
(number 0), which holds nobody's tokens.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.kernels.cache.block_tables import BlockTables
from vllm_kvcompress.plans import CompactionPlan, GroupCache, GroupLengths, GroupPlan
from vllm_kvcompress.policies.inputs import ChunkInputs, Queries
from vllm_kvcompress.worker.batch import CompactionJob
from vllm_kvcompress.worker.compaction.compactor import Compactor, QuerySources
from vllm_kvcompress.worker.lengths import EvictedLengths
from vllm_kvcompress.worker.queries.ring import QueryRing


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
                cache, blocks, self.num_tokens, queries.transpose(0, 1), layer.scale, layer.terms
            ),
            start=0,
            prompt_len=self.num_tokens,
            num_sink_tokens=self.config.num_sink_tokens,
            rotary=layer.rotary if policy.needs_rotary else None,
        )
        return policy.accumulate(None, chunk)


def warm_up_steps(
    lengths: EvictedLengths,
    ring: QueryRing,
    physical_slots: Callable[..., None],
    tables: BlockTables,
    slot_mappings: torch.Tensor,
) -> None:
    """Launch what every step launches around its forward pass, for a batch of one dummy.

    Parameters
    ----------
    lengths : EvictedLengths
        Evicted slots of all rows.
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
    lengths.group_seq_lens(batch)
    ring.assign(-1, 0)  # a row must record, or nothing is launched
    ring.begin_batch(batch)
    ring.end_batch()
    ring.assign(-1, -1)
    physical_slots(
        positions=batch.positions, query_start_loc=batch.query_start_loc,
        idx_mapping=batch.idx_mapping, evicted=lengths.evicted.gpu, tables=tables,
        out=slot_mappings,
    )  # fmt: skip


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
    for config in configs:
        length = warm_up_length(config, block_size)
        cache = GroupCache(length, ((0, config.num_sink_tokens),))
        lengths = GroupLengths(length, length - block_size)
        compact_nobody(compactor, config, block_size, queries, [(lengths, cache)])


def warm_up_length(config: CompressionConfig, block_size: int) -> int:
    """Tokens of the request that nobody made: whole blocks, more than are protected."""
    protected = config.num_sink_tokens + config.observation_window
    return (-(-protected // block_size) + 2) * block_size


def compact_nobody(
    compactor: Compactor,
    config: CompressionConfig,
    block_size: int,
    queries: Mapping[str, torch.Tensor],
    plans: Iterable[tuple[GroupLengths, GroupCache]],
) -> None:
    """Compact a request of `warm_up_length` tokens in the null block, once per plan.

    `plans` are carried out in all KV cache groups; the rest is as for `warm_up`.
    """
    num_groups = max(layer.group for layer in compactor.layers) + 1
    length = warm_up_length(config, block_size)
    spans = ((0, config.num_sink_tokens), (length - config.observation_window, length))
    own = copy.copy(compactor)
    source: Any = _NoQueries(compactor, config, length, queries)
    own.sources = QuerySources(source, source, source)
    for each, cache in plans:
        blocks = (0,) * (length // block_size), (0,) * (each.kept_len // block_size)
        group = GroupPlan(each, cache, spans, *blocks, tail_blocks=())
        plan = CompactionPlan("warm-up", length, False, 0, (group,) * num_groups)
        own.run([CompactionJob(plan, config, 0)])

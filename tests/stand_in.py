"""A model's caches on a device that has none: torch's ``meta``, where tensors have no data.

What a step does can be watched there at the size of a real model: which kernels it launches, what
it copies from the host, how much memory it holds. Nothing runs. Whatever would make the host wait
for the device (``.item()``, ``nonzero``, a copy back) has no answer there, and raises.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.kernels import dispatch, triton_backend
from vllm_kvcompress.kernels.cache.block_tables import BlockTables
from vllm_kvcompress.kernels.cache.rows import CacheRows
from vllm_kvcompress.kernels.codebook.format import codes_per_row
from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.lengths.budgets import (
    after_compaction,
    forced_ranges,
    layer_groups,
    linked_lengths,
    next_lengths,
    permanent_ranges,
)
from vllm_kvcompress.lengths.decode_queries import RingShape
from vllm_kvcompress.plans import CompactionPlan, GroupCache, GroupPlan, Purpose
from vllm_kvcompress.worker.batch import CompactionJob
from vllm_kvcompress.worker.codebook import rows as codebook_rows
from vllm_kvcompress.worker.codebook.feature import CodebookFeature
from vllm_kvcompress.worker.compaction.compactor import Compactor, QuerySources
from vllm_kvcompress.worker.draft.views import DraftViews
from vllm_kvcompress.worker.layout.layer_cache import LayerCache
from vllm_kvcompress.worker.layout.numbers import CacheNumbers
from vllm_kvcompress.worker.layout.strided import StridedLayout
from vllm_kvcompress.worker.lengths import EvictedLengths
from vllm_kvcompress.worker.model_runner import CompressionRunnerMixin
from vllm_kvcompress.worker.queries.prompt import PromptQueries
from vllm_kvcompress.worker.queries.ring import QueryRing
from vllm_kvcompress.worker.queries.window import QueryWindow

META = torch.device("meta")
Launch = Callable[[Any, tuple, dict], None]


@dataclass(frozen=True)
class Shape:
    """A model on one rank, and the server's sizes; Llama-3-8B with blocks of 16 tokens."""

    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    hidden_size: int = 4096
    dtype: torch.dtype = torch.bfloat16
    eight_bits: torch.dtype | None = None
    block_size: int = 16
    max_model_len: int = 131072
    max_num_reqs: int = 256
    max_num_tokens: int = 8192

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of the cache's elements, as vLLM makes it."""
        return self.dtype if self.eight_bits is None else torch.uint8

    @property
    def numbers(self) -> CacheNumbers:
        """What they stand for."""
        if self.eight_bits is None:
            return CacheNumbers()
        return CacheNumbers(self.eight_bits, lambda: (0.37, 2.5))


class HostBacked:
    """Stands for vLLM's `UvaBackedTensor`: memory of the host that the device reads in place."""

    def __init__(self, size: Any, dtype: torch.dtype, max_concurrency: int | None = None) -> None:
        self.cpu = torch.zeros(size, dtype=dtype)
        self.np = self.cpu.numpy()
        self.gpu = torch.zeros(size, dtype=dtype, device=META)

    def copy_to_uva(self, n: int | None = None) -> torch.Tensor:
        """The device sees what `np` holds."""
        return self.gpu


def replace_launches(monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    """Let every launch of a kernel call ``launch(kernel, args, kwargs)`` instead."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch(self, args, kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(JITFunction, "run", run)


@dataclass
class StandIn:
    """What a worker holds of one model under one setting."""

    config: CompressionConfig
    shape: Shape = field(default_factory=Shape)

    def __post_init__(self) -> None:
        shape, config = self.shape, self.config
        assert dispatch.backend_of(META) is triton_backend
        groups = layer_groups(shape.num_layers, config.layer_groups)
        self.num_groups = max(groups) + 1
        width = -(-shape.max_model_len // shape.block_size)
        self.tables = [
            torch.zeros(shape.max_num_reqs, width, dtype=torch.int32, device=META)
            for _ in range(self.num_groups)
        ]
        half = shape.head_dim // 2
        rotary = Rotary(torch.zeros(half, device=META), is_neox=True)
        projection = self._zeros(shape.num_heads, shape.hidden_size, shape.head_dim)
        self.layers = [
            LayerCache(
                name=f"layers.{index}", index=index, group=group, scale=shape.head_dim**-0.5,
                layout=StridedLayout(shape.head_dim, shape.block_size, shape.numbers),
                cache=partial(_same, self._cache()),
                rotary=rotary, output_projection=lambda: projection,
            )
            for index, group in enumerate(groups)
        ]  # fmt: skip
        window = max(config.observation_window, *(c.observation_window for c in self.configs))
        self.window, self.prompt = QueryWindow(META), PromptQueries()
        slots = RingShape(window, window + 10, shape.max_num_reqs)
        self.ring = QueryRing(slots, shape.max_num_reqs, shape.max_num_tokens, META)
        for layer in self.layers:
            self.ring.add_layer(layer.name, shape.num_heads, shape.head_dim, shape.dtype)
        self.lengths = EvictedLengths(self.num_groups, shape.max_num_reqs, META)
        self.views = DraftViews(self.tables, [shape.block_size] * self.num_groups)
        self.prompt.bind(self.layers, self._rows_so_far)
        self.compactor = self.make_compactor(QuerySources(self.window, self.prompt, self.ring))
        self.runner = self._make_runner()
        self.codebooks = CodebookFeature(self.runner)
        with patch.multiple(codebook_rows, UvaBackedTensor=HostBacked):
            self.codebooks.bind(None)
        self.runner.features = [self.codebooks]

    @property
    def configs(self) -> list[CompressionConfig]:
        """The setting and its variants by task."""
        return [self.config, *self.config.by_task.values()]

    def _rows_so_far(
        self, layer: LayerCache, row: int, num_tokens: int, queries: torch.Tensor
    ) -> CacheRows:
        """As the model runner finds them."""
        blocks = self.tables[layer.group][row, : -(-num_tokens // self.shape.block_size)]
        return layer.layout.rows_so_far(layer.cache(), blocks, num_tokens, queries, layer.scale)

    def _zeros(self, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(*size, dtype=dtype or self.shape.dtype, device=META)

    def _cache(self) -> torch.Tensor:
        """[blocks, KV, N, 2 D], the tokens of a block outside its heads, as vLLM's default."""
        shape = self.shape
        size = 4096, shape.block_size, shape.num_kv_heads, 2 * shape.head_dim
        return self._zeros(*size, dtype=shape.cache_dtype).transpose(1, 2)

    def make_compactor(self, sources: Any) -> Compactor:
        """A compactor that takes its queries there."""
        return Compactor(
            layers=self.layers, num_layers=self.shape.num_layers, sources=sources, device=META,
            all_reduce=lambda tensor: tensor, num_ranks=1, first_kv_head=0,
        )  # fmt: skip

    def query(self, num_tokens: int) -> torch.Tensor:
        """[T, H, D] queries as a layer hands them over: a part of its fused projection."""
        shape = self.shape
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        fused = self._zeros(num_tokens, width)
        return fused[:, : shape.num_heads * shape.head_dim].view(num_tokens, -1, shape.head_dim)

    def _make_runner(self) -> Any:
        """A model runner that has loaded nothing."""
        runner = CompressionRunnerMixin.__new__(CompressionRunnerMixin)
        shape = self.shape
        attention = SimpleNamespace(num_heads=shape.num_heads, head_size=shape.head_dim)
        slots = self._zeros(self.num_groups, shape.max_num_tokens, dtype=torch.int64)
        runner.__dict__ |= {
            "device": META, "dtype": shape.dtype, "compactor": self.compactor,
            "max_num_reqs": shape.max_num_reqs, "speculator": None,
            "model_state": SimpleNamespace(
                config=self.config, window=self.window, ring=self.ring, lengths=self.lengths,
            ),
            "tables": BlockTables.of(self.tables, [shape.block_size] * self.num_groups),
            "compacted_layers": SimpleNamespace(
                by_name=lambda: {layer.name: attention for layer in self.layers}
            ),
            "_physical_slots": dispatch.backend_of(META).physical_slots,
            "block_tables": SimpleNamespace(
                slot_mappings=slots, block_sizes=[shape.block_size] * self.num_groups
            ),
        }  # fmt: skip
        return runner

    # --- requests -------------------------------------------------------------------------

    def plan(
        self, name: str, config: CompressionConfig, prompt_len: int, grown: int = 0, **more: Any
    ) -> CompactionPlan:
        """What the scheduler would decide at a prompt's end, or so many tokens after it.

        The later compaction finds what the one at the prompt's end has left.
        """
        shape = self.shape
        per_row = codes_per_row(shape.head_dim * shape.cache_dtype.itemsize)
        cache = GroupCache(prompt_len, permanent_ranges(prompt_len, config))
        caches = [cache] * self.num_groups
        lengths = next_lengths(prompt_len, prompt_len, caches, config, shape.block_size, per_row)
        if grown:
            after = [
                after_compaction(each, own) if own else each
                for each, own in zip(caches, lengths, strict=True)
            ]
            caches = [replace(each, num_tokens=each.num_tokens + grown) for each in after]
            lengths = next_lengths(
                prompt_len, prompt_len + grown, caches, config, shape.block_size, per_row
            )
        is_linked = more.get("purpose") is Purpose.LINKED_VIEW
        found: list[GroupPlan | None] = []
        for own, held in zip(lengths, caches, strict=True):
            forced = forced_ranges(held, config.observation_window)
            if own is not None and is_linked:
                own = linked_lengths(own, forced, shape.block_size)
            if own is None:
                found.append(None)
                continue
            blocks = tuple(range(1, -(-held.num_tokens // shape.block_size) + 1))
            split = own.region_len // shape.block_size
            targets = tuple(range(2000, 2000 + own.kept_len // shape.block_size))
            found.append(
                GroupPlan(
                    own, held, tuple((s, min(e, own.region_len)) for s, e in forced
                                     if s < own.region_len),
                    blocks[:split], () if is_linked else targets, blocks[split:],
                )
            )  # fmt: skip
        return CompactionPlan(name, prompt_len + grown, grown > 0, 7, tuple(found), **more)


def _same(cache: torch.Tensor) -> torch.Tensor:
    return cache


def batch(rows: list[tuple[int, int, int]]) -> SimpleNamespace:
    """vLLM's batch of rows (request row, tokens computed before, tokens of this step)."""
    counts = np.array([count for *_, count in rows], dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    ends = np.array([computed + count for _, computed, count in rows], dtype=np.int32)
    return SimpleNamespace(
        req_ids=[str(row) for row, *_ in rows],
        num_reqs=len(rows),
        num_tokens=int(starts[-1]),
        idx_mapping=torch.zeros(len(rows), dtype=torch.int64, device=META),
        idx_mapping_np=np.array([row for row, *_ in rows]),
        num_computed_tokens_np=np.array([computed for _, computed, _ in rows], dtype=np.int32),
        num_scheduled_tokens=counts,
        query_start_loc=torch.zeros(len(rows) + 1, dtype=torch.int32, device=META),
        query_start_loc_np=starts,
        positions=torch.zeros(int(starts[-1]), dtype=torch.int64, device=META),
        seq_lens=torch.zeros(len(rows), dtype=torch.int32, device=META),
        seq_lens_cpu_upper_bound=torch.from_numpy(ends),
    )


def jobs_of(
    stand_in: StandIn, config: CompressionConfig, lengths: list[int], grown: int = 0, **more: Any
) -> list[CompactionJob]:
    """One job per prompt that long, in request rows from 0 on."""
    return [
        CompactionJob(stand_in.plan(str(row), config, length, grown, **more), config, row)
        for row, length in enumerate(lengths)
    ]

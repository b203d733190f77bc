"""Executes compaction plans: score, select, copy, rewrite the block table row."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_kvcompress.budgets import forced_ranges, layer_groups
from vllm_kvcompress.config import CompressionConfig
from vllm_kvcompress.kernels.compact_pages import gather_rows
from vllm_kvcompress.plans import CompactionPlan, GroupPlan
from vllm_kvcompress.policies.base import Policy, ScoreInputs
from vllm_kvcompress.worker.layout import CacheLayout
from vllm_kvcompress.worker.query_window import QueryWindow


@dataclass(frozen=True)
class LayerCache:
    """One attention layer and where its cache lies.

    Attributes
    ----------
    name : str
        vLLM's name of the layer.
    index : int
        Number of the layer in the model, from 0.
    group : int
        KV cache group.
    scale : float
        Softmax scale.
    layout : CacheLayout
        How its blocks are laid out.
    cache : callable
        Returns the layer's cache tensor (it is bound late and may be rebound).
    """

    name: str
    index: int
    group: int
    scale: float
    layout: CacheLayout
    cache: Callable[[], torch.Tensor]


class Compactor:
    """Runs plans on this rank's layers.

    Parameters
    ----------
    layers : list[LayerCache]
        All attention layers, in model order.
    num_layers : int
        Layers of the model.
    window : QueryWindow
        Where the queries are.
    device : torch.device
        Device of the caches.
    all_reduce, num_ranks
        Sum over tensor-parallel ranks, and their number.
    first_kv_head : int
        Number of this rank's first KV head in the model.
    """

    def __init__(
        self,
        layers: list[LayerCache],
        num_layers: int,
        window: QueryWindow,
        device: torch.device,
        all_reduce: Callable[[torch.Tensor], torch.Tensor],
        num_ranks: int,
        first_kv_head: int,
    ) -> None:
        self.layers = layers
        self.num_layers = num_layers
        self.window = window
        self.device = device
        self.all_reduce = all_reduce
        self.num_ranks = num_ranks
        self.first_kv_head = first_kv_head

    @torch.inference_mode()
    def run(self, plan: CompactionPlan, config: CompressionConfig) -> None:
        """Fill the plan's destination blocks in every layer. Source blocks are only read."""
        policy: Policy = config.build_policy()
        sharing = layer_groups(self.num_layers, config.layer_groups)
        forced = self._forced_mask(plan.prompt_len, config)
        shared: dict[int, torch.Tensor] = {}
        for layer in self.layers:
            group = plan.groups[layer.group]
            if group is None:
                continue
            keys, values = self._read_prompt(layer, group)
            scores = shared.get(sharing[layer.index]) if policy.shares_scores else None
            if scores is None:
                scores = self._score(policy, plan, layer, keys[:, : plan.prompt_len], config)
                shared[sharing[layer.index]] = scores
            self._copy(policy, layer, group, scores, forced, keys, values)

    def _read_prompt(
        self, layer: LayerCache, group: GroupPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all blocks the prompt lies in, and of what follows in them."""
        blocks = torch.tensor(group.source_blocks + group.tail_blocks, device=self.device)
        return layer.layout.read(layer.cache(), blocks)

    def _score(
        self,
        policy: Policy,
        plan: CompactionPlan,
        layer: LayerCache,
        keys: torch.Tensor,
        config: CompressionConfig,
    ) -> torch.Tensor:
        queries = None
        if policy.needs_queries:
            queries = self.window.take(plan.request_id, layer.name)
        return policy.score(
            ScoreInputs(
                keys=keys,
                queries=queries,
                scale=layer.scale,
                num_sink_tokens=config.num_sink_tokens,
                layer_index=layer.index,
                seed=plan.seed,
                all_reduce=self.all_reduce,
                num_ranks=self.num_ranks,
                first_kv_head=self.first_kv_head,
            )
        )

    def _forced_mask(self, prompt_len: int, config: CompressionConfig) -> torch.Tensor:
        """[prompt_len] bool: positions that are never evicted."""
        mask = torch.zeros(prompt_len, dtype=torch.bool, device=self.device)
        for start, end in forced_ranges(prompt_len, config):
            mask[start:end] = True
        return mask

    def _copy(
        self,
        policy: Policy,
        layer: LayerCache,
        group: GroupPlan,
        scores: torch.Tensor,
        forced: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        region = group.lengths.region_len
        indices = policy.select(scores[:, :region], forced[:region], group.lengths.kept_len)
        destination = torch.tensor(group.destination_blocks, device=self.device)
        layer.layout.write(
            layer.cache(),
            destination,
            gather_rows(keys[:, :region], indices),
            gather_rows(values[:, :region], indices),
        )


class CompactionTimer:
    """Time spent on compactions, read without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._uses_events = device.type == "cuda"
        self._running: list[tuple[Any, Any]] = []
        self._done: list[float] = []

    def __enter__(self) -> "CompactionTimer":
        self._start = self._now()
        return self

    def __exit__(self, *exception: object) -> None:
        end = self._now()
        if self._uses_events:
            self._running.append((self._start, end))
        else:
            self._done.append(end - self._start)

    def _now(self) -> Any:
        if not self._uses_events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> Iterable[float]:
        """Seconds of the compactions that are known to have finished since the last call."""
        while self._running and self._running[0][1].query():
            start, end = self._running.pop(0)
            self._done.append(start.elapsed_time(end) / 1e3)
        done, self._done = self._done, []
        return done

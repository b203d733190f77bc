"""Executes compaction plans: score, select, copy."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_kvcompress.budgets import layer_groups
from vllm_kvcompress.kernels.compact_pages import gather_rows
from vllm_kvcompress.kernels.rotary import Rotary
from vllm_kvcompress.plans import CompactionPlan, GroupPlan, Span
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import Queries, ScoreInputs
from vllm_kvcompress.settings import CompressionConfig
from vllm_kvcompress.worker.layer_parts import require_parts
from vllm_kvcompress.worker.layout import CacheLayout
from vllm_kvcompress.worker.prompt_queries import PromptQueries
from vllm_kvcompress.worker.query_ring import QueryRing
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
    rotary : Rotary or None
        Its rotary embedding.
    output_projection : callable or None
        Returns [num_heads, hidden_size, head_dim].
    """

    name: str
    index: int
    group: int
    scale: float
    layout: CacheLayout
    cache: Callable[[], torch.Tensor]
    rotary: Rotary | None = None
    output_projection: Callable[[], torch.Tensor] | None = None


@dataclass(frozen=True)
class QuerySources:
    """Where the queries of a request are: while its prompt runs, and while it decodes."""

    window: QueryWindow
    prompt: PromptQueries
    ring: QueryRing


class Compactor:
    """Runs plans on this rank's layers.

    Parameters
    ----------
    layers : list[LayerCache]
        All attention layers, in model order.
    num_layers : int
        Layers of the model.
    sources : QuerySources
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
        sources: QuerySources,
        device: torch.device,
        all_reduce: Callable[[torch.Tensor], torch.Tensor],
        num_ranks: int,
        first_kv_head: int,
    ) -> None:
        self.layers = layers
        self.num_layers = num_layers
        self.sources = sources
        self.device = device
        self.all_reduce = all_reduce
        self.num_ranks = num_ranks
        self.first_kv_head = first_kv_head

    @torch.inference_mode()
    def run(self, plan: CompactionPlan, config: CompressionConfig, req_index: int) -> None:
        """Fill the plan's destination blocks in every layer. Source blocks are only read.

        Parameters
        ----------
        plan : CompactionPlan
            What the scheduler decided.
        config : CompressionConfig
            The request's setting.
        req_index : int
            The request's row.
        """
        policy: Policy = config.build_policy()
        sharing = layer_groups(self.num_layers, config.layer_groups)
        # Groups that hold different numbers of tokens cannot share scores any more.
        shared: dict[tuple[int, int], torch.Tensor] = {}
        for layer in self.layers:
            group = plan.groups[layer.group]
            if group is None:
                continue
            keys, values = self._read(layer, group)
            place = (sharing[layer.index], group.cache.num_tokens)
            scores = shared.get(place) if policy.shares_scores else None
            if scores is None:
                queries, summary = self._queries(policy, plan, config, req_index, layer)
                inputs = self._inputs(plan, config, layer, group, keys, values)
                scores = policy.score(
                    replace(inputs, queries=queries, accumulated=summary, **_parts(policy, layer))
                )
                shared[place] = scores
            indices = self._select(policy, layer, group, scores)
            self._copy(policy, layer, group, indices, keys, values)

    def _read(self, layer: LayerCache, group: GroupPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all blocks the request has, and of what lies behind its tokens."""
        blocks = torch.tensor(group.source_blocks + group.tail_blocks, device=self.device)
        return layer.layout.read(layer.cache(), blocks)

    def _queries(
        self,
        policy: Policy,
        plan: CompactionPlan,
        config: CompressionConfig,
        req_index: int,
        layer: LayerCache,
    ) -> tuple[torch.Tensor | None, Any]:
        """Queries of the observation window, or the summary of all queries of the prompt."""
        if policy.queries is Queries.NONE:
            return None, None
        if plan.while_decoding:
            window = config.observation_window
            return self.sources.ring.take(req_index, layer.name, plan.position, window), None
        if policy.queries is Queries.PROMPT:
            return None, self.sources.prompt.take(plan.request_id, layer.name)
        return self.sources.window.take(plan.request_id, layer.name), None

    def _inputs(
        self,
        plan: CompactionPlan,
        config: CompressionConfig,
        layer: LayerCache,
        group: GroupPlan,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> ScoreInputs:
        num_tokens = group.cache.num_tokens
        return ScoreInputs(
            keys=keys[:, :num_tokens],
            values=values[:, :num_tokens],
            queries=None,
            accumulated=None,
            scale=layer.scale,
            position=plan.position,
            num_keep=num_tokens - group.lengths.evicted,
            forced=self._mask(num_tokens, group.forced),
            num_sink_tokens=config.num_sink_tokens,
            layer_index=layer.index,
            seed=plan.seed,
            all_reduce=self.all_reduce,
            num_ranks=self.num_ranks,
            first_kv_head=self.first_kv_head,
        )

    def _mask(self, num_tokens: int, ranges: Iterable[Span]) -> torch.Tensor:
        """[num_tokens] bool: whether a position is in one of the ranges."""
        mask = torch.zeros(num_tokens, dtype=torch.bool, device=self.device)
        for start, end in ranges:
            mask[start:end] = True
        return mask

    def _select(
        self, policy: Policy, layer: LayerCache, group: GroupPlan, scores: torch.Tensor
    ) -> torch.Tensor:
        """Survivors of the region, [num_kv_heads, kept_len], in the order they are written."""
        region = group.lengths.region_len
        forced = self._mask(region, group.forced)
        indices = policy.select(scores[:, :region], forced, group.lengths.kept_len)
        permanent = [span for span in group.cache.permanent if span[0] < region]
        if len(permanent) > 1 or any(start > 0 for start, _ in permanent):
            # Pins go to the front: from now on they have the same indices in every head.
            movable = ~self._mask(region, permanent)
            order = movable[indices].to(torch.uint8).sort(dim=-1, stable=True).indices
            indices = indices.gather(1, order)
        return indices

    def _copy(
        self,
        policy: Policy,
        layer: LayerCache,
        group: GroupPlan,
        indices: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        region = group.lengths.region_len
        kept_keys = gather_rows(keys[:, :region], indices)
        if policy.rerotates_keys:
            # Survivors take neighbouring positions that end where the tail begins. Indices and
            # positions differ by what earlier compactions evicted, the same before and after.
            assert layer.rotary is not None
            targets = torch.arange(region - indices.shape[1], region, device=self.device)
            kept_keys = layer.rotary.rotate(kept_keys, targets - indices)
        destination = torch.tensor(group.destination_blocks, device=self.device)
        layer.layout.write(
            layer.cache(), destination, kept_keys, gather_rows(values[:, :region], indices)
        )


def _parts(policy: Policy, layer: LayerCache) -> dict[str, Any]:
    """The parts of the layer that the policy asked for."""
    require_parts(policy, layer.rotary, layer.output_projection, layer.name)
    parts: dict[str, Any] = {}
    if policy.needs_rotary:
        parts["rotary"] = layer.rotary
    if policy.needs_output_projection and layer.output_projection is not None:
        parts["output_projection"] = layer.output_projection()
    return parts

"""Executes compaction plans: score, select, copy."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from vllm_kvcompress.budgets import layer_groups, score_leaders
from vllm_kvcompress.kernels.cache_rows import CacheRows
from vllm_kvcompress.kernels.dispatch import for_device
from vllm_kvcompress.plans import GroupPlan, PlanKind
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import Queries, ScoreInputs
from vllm_kvcompress.worker.codebook_writer import CodebookWriter
from vllm_kvcompress.worker.group_batch import CompactionJob, GroupBatch
from vllm_kvcompress.worker.layer_cache import LayerCache
from vllm_kvcompress.worker.layer_parts import require_parts
from vllm_kvcompress.worker.prompt_queries import PromptQueries
from vllm_kvcompress.worker.query_ring import QueryRing
from vllm_kvcompress.worker.query_window import QueryWindow

_MAX_TOKENS = 2**18
"""Tokens of requests that are compacted at once: their scores take 256 MiB for 32 layers with 8 KV
heads, and are held until the last layer is scored."""


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
    entry_counts : torch.Tensor or None
        [layers, request rows, 2, num_kv_heads] int32, where to keep how many entries of codebooks
        are in use; None where no codebook is ever extended.
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
        entry_counts: torch.Tensor | None = None,
    ) -> None:
        self.layers = layers
        self.num_layers = num_layers
        self.sources = sources
        self.device = device
        self.all_reduce = all_reduce
        self.num_ranks = num_ranks
        self.first_kv_head = first_kv_head
        self.select_tokens = for_device("select_tokens", device).select_tokens
        self.codebooks = CodebookWriter(entry_counts, all_reduce if num_ranks > 1 else None)

    @torch.inference_mode()
    def run(self, jobs: Sequence[CompactionJob]) -> None:
        """Fill the plans' destination blocks in every layer. Source blocks are only read.

        Requests under the same policy go through every launch together.
        """
        for batch in _batches(jobs):
            self._run_batch(batch)

    @torch.inference_mode()
    def choose_blocks(self, jobs: Sequence[CompactionJob]) -> dict[tuple[str, int], torch.Tensor]:
        """Source blocks that make up linked views, by request and KV cache group.

        All heads and layers of a group have the same scores, in windows of whole blocks. A block
        with a token that stays anyway comes first.

        Returns
        -------
        dict
            [kept blocks] int32 each, in the order of the request's own row.
        """
        chosen: dict[tuple[str, int], torch.Tensor] = {}
        for batch in _batches(jobs):
            policy: Policy = batch[0].config.build_policy()
            shared: dict[tuple, torch.Tensor] = {}
            leaders = {layer.group: layer for layer in reversed(self.layers)}
            for number, layer in sorted(leaders.items(), key=lambda each: each[1].index):
                group = GroupBatch.of(batch, number, self.device)
                if group is None:
                    continue
                scores = self._scores(policy, group, layer, shared)
                for request, (job, plan) in enumerate(zip(group.jobs, group.plans, strict=True)):
                    blocks = self._best_blocks(group, request, plan, scores[request])
                    chosen[job.plan.request_id, number] = blocks
        return chosen

    def _best_blocks(
        self, group: GroupBatch, request: int, plan: GroupPlan, scores: torch.Tensor
    ) -> torch.Tensor:
        num_blocks, region = len(plan.source_blocks), plan.lengths.region_len
        size = region // num_blocks
        num_keep = plan.lengths.kept_len // size
        means = scores[0, :region].float().reshape(num_blocks, size).mean(dim=1)
        forced = group.forced[request, :region].view(num_blocks, size).any(dim=1)
        counts = torch.tensor([[num_blocks], [num_keep]], dtype=torch.int32).to(self.device)
        best = self.select_tokens(
            means[None, None, None], forced[None], counts[0], counts[1], num_keep
        )
        return group.block_table[request][best[0, 0, 0]]

    def _run_batch(self, jobs: list[CompactionJob]) -> None:
        """Score all layers, in model order; then choose and copy, one KV cache group at a time."""
        policy: Policy = jobs[0].config.build_policy()
        numbers = dict.fromkeys(layer.group for layer in self.layers)
        kinds = [(number, kind) for number in numbers for kind in PlanKind]
        groups = {
            (number, kind): found
            for number, kind in kinds
            if (found := GroupBatch.of(jobs, number, self.device, kind)) is not None
        }
        scores: dict[tuple[int, PlanKind], list[torch.Tensor]] = {}
        shared: dict[tuple, torch.Tensor] = {}
        for layer in self.layers:
            for kind in (PlanKind.TOKENS, PlanKind.CODES):
                group = groups.get((layer.group, kind))
                if group is not None:
                    scores[layer.index, kind] = self._scores(policy, group, layer, shared)
        for (number, kind), group in groups.items():
            layers = [layer for layer in self.layers if layer.group == number]
            if kind is PlanKind.MORE_CODES:
                self.codebooks.extend(group, layers)
                continue
            own = [scores.pop((layer.index, kind)) for layer in layers]
            indices = self._select(group, layers, own)
            if kind is PlanKind.CODES:
                self.codebooks.write(group, layers, indices)
            else:
                self._copy(policy, group, layers, indices)

    # --- score ----------------------------------------------------------------------------

    def _scores(
        self,
        policy: Policy,
        group: GroupBatch,
        layer: LayerCache,
        shared: dict[tuple, torch.Tensor],
    ) -> list[torch.Tensor]:
        """Scores [num_kv_heads, n] of every request, its leader's where layers share them."""
        groups = layer_groups(self.num_layers, group.jobs[0].config.layer_groups)
        leaders = score_leaders(groups, policy.layers_per_ranking)
        # Groups that hold different numbers of tokens cannot share scores any more, nor can an
        # eviction and a view of one request: scores may depend on how many tokens are kept.
        places = [
            ((job.plan.request_id, job.plan.is_view), leaders[layer.index], length)
            for job, length in zip(group.jobs, group.lengths, strict=True)
        ]
        if not policy.shares_scores or any(place not in shared for place in places):
            taken = [self._queries(policy, job, layer) for job in group.jobs]
            rows = layer.layout.rows(
                layer.cache(), group, [queries for queries, _ in taken], layer.scale
            )
            for request, place in enumerate(places):
                if policy.shares_scores and place in shared:
                    continue
                inputs = self._inputs(policy, group, request, layer, rows[request])
                shared[place] = policy.score(replace(inputs, accumulated=taken[request][1]))
        return [shared[place] for place in places]

    def _queries(
        self, policy: Policy, job: CompactionJob, layer: LayerCache
    ) -> tuple[torch.Tensor | None, Any]:
        """Queries of the observation window, or the summary of all queries of the prompt."""
        plan = job.plan
        if policy.queries is Queries.NONE:
            return None, None
        if plan.while_decoding:
            window = job.config.observation_window
            return self.sources.ring.take(job.req_index, layer.name, plan.position, window), None
        if policy.queries is Queries.PROMPT:
            return None, self.sources.prompt.take(plan.request_id, layer.name)
        return self.sources.window.take(plan.request_id, layer.name), None

    def _inputs(
        self,
        policy: Policy,
        group: GroupBatch,
        request: int,
        layer: LayerCache,
        rows: CacheRows,
    ) -> ScoreInputs:
        plan, job = group.plans[request], group.jobs[request]
        num_tokens = plan.cache.num_tokens
        return ScoreInputs(
            rows=rows,
            accumulated=None,
            position=job.plan.position,
            num_keep=num_tokens - plan.lengths.tokens_evicted,
            forced=group.forced[request, :num_tokens],
            num_sink_tokens=job.config.num_sink_tokens,
            layer_index=layer.index,
            seed=job.plan.seed,
            all_reduce=self.all_reduce,
            num_ranks=self.num_ranks,
            first_kv_head=self.first_kv_head,
            **_parts(policy, layer),
        )

    # --- select and copy ------------------------------------------------------------------

    def _select(
        self, group: GroupBatch, layers: list[LayerCache], scores: list[list[torch.Tensor]]
    ) -> torch.Tensor:
        """Survivors of the regions in the order they are written, [L, R, num_kv_heads, K] int64."""
        regions = [plan.lengths.region_len for plan in group.plans]
        longest, max_keep = max(regions), max(p.lengths.num_survivors for p in group.plans)
        rows = [
            row[:, :region] if region == longest else pad(row[:, :region], (0, longest - region))
            for each in scores
            for row, region in zip(each, regions, strict=True)
        ]
        stacked = torch.stack(rows).float().unflatten(0, (len(layers), len(regions)))
        indices = self.select_tokens(
            stacked, group.forced[:, :longest], group.region_len, group.num_survivors, max_keep
        )
        for request, plan in enumerate(group.plans):
            _pins_first(indices[:, request, :, : plan.lengths.num_survivors], plan)
        return indices

    def _copy(
        self,
        policy: Policy,
        group: GroupBatch,
        layers: list[LayerCache],
        indices: torch.Tensor,
    ) -> None:
        """Survivors to destination blocks; vLLM lays out all layers of a group alike."""
        rotary = layers[0].rotary if policy.rerotates_keys else None
        layers[0].layout.move([layer.cache() for layer in layers], group, indices, rotary)


def _batches(jobs: Sequence[CompactionJob]) -> Iterator[list[CompactionJob]]:
    """Jobs that the same policy scores alike, no more tokens at once than `_MAX_TOKENS`."""
    alike: dict[tuple, list[CompactionJob]] = {}
    for job in jobs:
        config = job.config
        # At the end of a prompt some policies read a summary, while decoding the ring's queries.
        key = (config.policy, config.observation_window, config.layer_groups, config.codebook)
        alike.setdefault((repr(key), job.plan.while_decoding), []).append(job)
    for same in alike.values():
        batch: list[CompactionJob] = []
        for job in same:
            if batch and sum(each.plan.position for each in [*batch, job]) > _MAX_TOKENS:
                yield batch
                batch = []
            batch.append(job)
        yield batch


def _pins_first(indices: torch.Tensor, plan: GroupPlan) -> None:
    """Put pins before all other survivors, in place: from now on all heads have them alike.

    Parameters
    ----------
    indices : torch.Tensor
        [L, num_kv_heads, K] int64, ascending survivors of one request.
    plan : GroupPlan
        Its plan.
    """
    region = plan.lengths.region_len
    permanent = [span for span in plan.cache.permanent if span[0] < region]
    if len(permanent) <= 1 and all(start == 0 for start, _ in permanent):
        return  # sinks alone are in front already
    movable = torch.ones(region, dtype=torch.uint8)
    for start, end in permanent:
        movable[start:end] = 0
    order = movable.to(indices.device)[indices].sort(dim=-1, stable=True).indices
    indices.copy_(indices.gather(-1, order))


def _parts(policy: Policy, layer: LayerCache) -> dict[str, Any]:
    """The parts of the layer that the policy asked for."""
    require_parts(policy, layer.rotary, layer.output_projection, layer.name)
    parts: dict[str, Any] = {}
    if policy.needs_rotary:
        parts["rotary"] = layer.rotary
    if policy.needs_output_projection and layer.output_projection is not None:
        parts["output_projection"] = layer.output_projection()
    return parts

"""Executes compaction plans: score, select, copy.

Knows no vLLM, and of the kinds of plans only the one whose survivors are copied as they are; other
kinds are written by who registers for them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.kernels.cache.rows import CacheRows
from vllm_kvcompress.kernels.dispatch import backend_of
from vllm_kvcompress.kernels.host_copy import to_device
from vllm_kvcompress.lengths.budgets import layer_groups, score_leaders
from vllm_kvcompress.plans import PlanKind
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import Queries, ScoreInputs
from vllm_kvcompress.worker.batch import CompactionJob, GroupBatch, group_batches
from vllm_kvcompress.worker.compaction.faults import StepFaults
from vllm_kvcompress.worker.compaction.group_scores import GroupScores, check_scored
from vllm_kvcompress.worker.layout.layer_cache import LayerCache
from vllm_kvcompress.worker.queries.prompt import PromptQueries
from vllm_kvcompress.worker.queries.ring import QueryRing
from vllm_kvcompress.worker.queries.window import QueryWindow

MAX_TOKENS = 2**17
"""Requests that are compacted at once, times the longest one's tokens; a longer request is
compacted alone. A KV cache group's scores take four bytes per token, layer and KV head (128 MiB
for 32 layers with 8 heads), and are held until its last layer is scored: see working_memory.py."""


@dataclass(frozen=True)
class QuerySources:
    """Where the queries of a request are: while its prompt runs, and while it decodes."""

    window: QueryWindow
    prompt: PromptQueries
    ring: QueryRing


Writer = Callable[[GroupBatch, list[LayerCache], torch.Tensor], None]
"""Fills the destination blocks of a group's requests in L layers with their survivors, indices
[L, R, KV, K] int64 in the order in which they are written."""

Extender = Callable[[GroupBatch, list[LayerCache]], None]
"""Fills destination blocks of a group's requests without a choice of survivors."""


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
    shares_head : bool
        Whether all ranks hold copies of one KV head that all query heads of the model read, latents
        (MLA). Scores are averaged over ranks then, so that all keep the same tokens.

    Attributes
    ----------
    num_sums : int
        Sums over ranks that this rank has taken part in.
    writers, extenders : dict[PlanKind, callable]
        How plans of other kinds than ``TOKENS`` are carried out: with scores, and without.
    faults : StepFaults or None
        Takes what goes wrong, so that every plan is carried out somehow; None, as while starting:
        it is raised.
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
        shares_head: bool = False,
    ) -> None:
        self.layers = layers
        self.num_layers = num_layers
        self.sources = sources
        self.device = device
        self._all_reduce = all_reduce
        self.num_sums = 0
        self.num_ranks = num_ranks
        self.first_kv_head = first_kv_head
        self.shares_head = shares_head
        self.select_tokens = backend_of(device).select_tokens
        self.writers: dict[PlanKind, Writer] = {}
        self.extenders: dict[PlanKind, Extender] = {}
        self.faults: StepFaults | None = None

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over tensor-parallel ranks: as many calls on all of them, in one order."""
        self.num_sums += 1
        return self._all_reduce(tensor)

    @torch.inference_mode()
    def run(self, jobs: Sequence[CompactionJob]) -> None:
        """Fill the plans' destination blocks in every layer. Other source blocks are only read.

        Requests under the same policy go through every launch together.
        """
        for batch in batches(jobs):
            try:
                self._run_batch(batch)
            except Exception as error:  # a policy's, a kernel's, no memory: any of them
                if self.faults is None:
                    raise
                self.faults.note((job.plan.request_id for job in batch), error)
                self._empty_destinations(batch)

    def _empty_destinations(self, jobs: Sequence[CompactionJob]) -> None:
        """Let what nobody has filled, or in part, read as zeros: the codes among it are in range.

        The step that is under way reads it before the scheduler knows; its answer is thrown away.
        """
        for layer in self.layers:
            for job in jobs:
                plan = job.plan.groups[layer.group]
                if plan is None or not plan.destination_blocks:
                    continue
                blocks = to_device(plan.destination_blocks, torch.int64, self.device)
                keys, values = layer.layout.read(layer.cache(), blocks)
                layer.layout.write(layer.cache(), blocks, keys.zero_(), values.zero_())

    def _run_batch(self, jobs: list[CompactionJob]) -> None:
        """Score layers in model order; choose and copy in each KV cache group once it is scored.

        Destination blocks belong to one group of one request: what is copied early, no layer that
        is scored later reads.
        """
        policy: Policy = jobs[0].config.build_policy()
        addresses: dict[int, list[int]] = {}
        for layer in self.layers:
            addresses.setdefault(layer.group, []).append(layer.cache().data_ptr())
        groups = group_batches(jobs, addresses, self.device)
        scores: dict[tuple[int, PlanKind], GroupScores] = {
            (number, kind): GroupScores(group, len(addresses[number]))
            for (number, kind), group in groups.items()
            if kind not in self.extenders
        }
        shared: dict[tuple, torch.Tensor] = {}
        leaders = self._leaders(jobs[0].config, policy)
        last_user = {leaders[layer.index]: layer.index for layer in self.layers}
        for layer in self.layers:
            for kind in (PlanKind.TOKENS, PlanKind.TOKENS_IN_PLACE, *self.writers):
                place = layer.group, kind
                if place not in scores:
                    continue
                scores[place].add(self.scores(policy, groups[place], layer, shared))
                if scores[place].is_complete:
                    self._choose_and_copy(policy, groups[place], *place, scores.pop(place).take())
            if last_user[leaders[layer.index]] == layer.index:
                for key in [key for key in shared if key[1] == leaders[layer.index]]:
                    del shared[key]
        for (number, kind), group in groups.items():
            if kind in self.extenders:
                self.extenders[kind](group, self._layers_of(number))
        assert not scores, f"nobody writes plans of the kinds {[kind for _, kind in scores]}"

    def _choose_and_copy(
        self, policy: Policy, group: GroupBatch, number: int, kind: PlanKind, scores: torch.Tensor
    ) -> None:
        """Fill the destination blocks of group `number`, by scores [L, R, num_kv_heads, n]."""
        layers = self._layers_of(number)
        if self.faults is not None:
            regions = [plan.lengths.region_len for plan in group.plans]
            self.faults.look_at(group.jobs, regions, scores)
        indices = self._select(group, layers, scores)
        if kind in self.writers:
            self.writers[kind](group, layers, indices)
            return
        # vLLM lays out all layers of a group alike.
        layout = layers[0].layout
        move = layout.move_in_place if kind is PlanKind.TOKENS_IN_PLACE else layout.move
        rotary = layers[0].rotary if policy.rerotates_keys else None
        move([layer.cache() for layer in layers], group, indices, rotary)

    def _layers_of(self, number: int) -> list[LayerCache]:
        return [layer for layer in self.layers if layer.group == number]

    # --- score ----------------------------------------------------------------------------

    def scores(
        self,
        policy: Policy,
        group: GroupBatch,
        layer: LayerCache,
        shared: dict[tuple, torch.Tensor],
    ) -> list[torch.Tensor]:
        """Scores [num_kv_heads, n] of every request, its leader's where layers share them.

        `shared` holds what was scored for other layers, and is added to.
        """
        leaders = self._leaders(group.jobs[0].config, policy)
        # Groups that hold different numbers of tokens cannot share scores any more, nor can an
        # eviction and a view of one request: scores may depend on how many tokens are kept.
        places = [
            ((job.plan.request_id, job.plan.purpose.is_view), leaders[layer.index], length)
            for job, length in zip(group.jobs, group.lengths, strict=True)
        ]
        missing = [
            request
            for request, place in enumerate(places)
            if not policy.shares_scores or place not in shared
        ]
        if not missing:
            return [shared[place] for place in places]
        taken = [self._guarded(job, self._queries, policy, job, layer) for job in group.jobs]
        known = next((each for each in taken if each is not None), None)
        own = {}
        if known is not None:
            # Of a request whose queries are not there nobody reads the measurements.
            queries = [(each or known)[0] for each in taken]
            rows = layer.layout.rows(layer.cache(), group, queries, layer.scale, layer.terms)
            for request in missing:
                what = policy, group, request, layer, rows[request], taken[request]
                own[request] = self._guarded(group.jobs[request], self._score, *what)
        for request in missing:
            scored = own.get(request)
            if scored is None:
                size = layer.cache().shape[1], group.lengths[request]
                scored = torch.zeros(size, device=self.device)
            own[request] = self._of_all_ranks(scored)
        if policy.shares_scores:
            shared.update((places[request], scores) for request, scores in own.items())
        return [
            own[request] if request in own else shared[place]
            for request, place in enumerate(places)
        ]

    def _score(
        self,
        policy: Policy,
        group: GroupBatch,
        request: int,
        layer: LayerCache,
        rows: CacheRows,
        taken: tuple[torch.Tensor | None, Any],
    ) -> torch.Tensor:
        inputs = replace(self._inputs(policy, group, request, layer, rows), accumulated=taken[1])
        scored = policy.score(inputs)
        check_scored(policy, scored, (rows.num_kv_heads, rows.num_tokens), layer)
        return scored

    def _guarded(self, job: CompactionJob, function: Callable[..., Any], *args: Any) -> Any:
        """What `function` returns; None, and noted, if it fails for this request or has before."""
        if self.faults is None:
            return function(*args)
        if job.plan.request_id not in self.faults.errors:
            with self.faults.of([job]):
                return function(*args)
        return None

    def _of_all_ranks(self, scores: torch.Tensor) -> torch.Tensor:
        """[num_kv_heads, n]: the mean over ranks where these share the head."""
        if not self.shares_head or self.num_ranks == 1:
            return scores
        return self.all_reduce(scores.clone()) / self.num_ranks

    def _leaders(self, config: CompressionConfig, policy: Policy) -> list[int]:
        """For every layer of the model the one that scores for it."""
        groups = layer_groups(self.num_layers, config.layer_groups)
        return score_leaders(groups, policy.layers_per_ranking)

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
        return self.sources.window.take(plan.request_id, layer.name, plan.position), None

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
            forced=group.shown_forced[request, :num_tokens],
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
        self, group: GroupBatch, layers: list[LayerCache], scores: torch.Tensor
    ) -> torch.Tensor:
        """Survivors of the regions in the order they are written, [L, R, num_kv_heads, K] int64."""
        assert len(layers) == len(scores)
        max_keep = max(plan.lengths.num_survivors for plan in group.plans)
        forced = group.forced[:, : scores.shape[3]]
        indices = self.select_tokens(
            scores, forced, group.region_len, group.num_survivors, max_keep
        )
        if group.permanent is not None:
            for request, (plan, stays) in enumerate(zip(group.plans, group.permanent, strict=True)):
                _permanent_first(indices[:, request, :, : plan.lengths.num_survivors], stays)
        return indices


def batches(jobs: Sequence[CompactionJob]) -> Iterator[list[CompactionJob]]:
    """Jobs that the same policy scores alike, no more tokens at once than `MAX_TOKENS`.

    Tables of scores are as wide as the longest request: it counts for all.
    """
    alike: dict[tuple, list[CompactionJob]] = {}
    for job in jobs:
        config = job.config
        # At the end of a prompt some policies read a summary, while decoding the ring's queries.
        key = (config.policy, config.observation_window, config.layer_groups, config.codebook)
        alike.setdefault((repr(key), job.plan.while_decoding), []).append(job)
    for same in alike.values():
        batch: list[CompactionJob] = []
        for job in same:
            longest = max(each.plan.position for each in [*batch, job])
            if batch and (len(batch) + 1) * longest > MAX_TOKENS:
                yield batch
                batch = []
            batch.append(job)
        yield batch


def _permanent_first(indices: torch.Tensor, permanent: torch.Tensor) -> None:
    """Put sinks and pins before all other survivors, in place: then all heads have them alike.

    Parameters
    ----------
    indices : torch.Tensor
        [L, num_kv_heads, K] int64, ascending survivors of one request.
    permanent : torch.Tensor
        [n] bool, its tokens that no compaction evicts.
    """
    order = permanent.logical_not().to(torch.uint8)[indices].sort(dim=-1, stable=True).indices
    indices.copy_(indices.gather(-1, order))


def _parts(policy: Policy, layer: LayerCache) -> dict[str, Any]:
    """The parts of the layer that the policy asked for."""
    layer.require(policy)
    parts: dict[str, Any] = {}
    if policy.needs_rotary:
        parts["rotary"] = layer.rotary
    if policy.needs_output_projection and layer.output_projection is not None:
        parts["output_projection"] = layer.output_projection()
    return parts

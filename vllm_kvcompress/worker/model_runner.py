"""Model runner mix-in: installs the model state, physical slots, and compaction after the forward.

Works on vLLM's model runner V2, on CPU and GPU alike.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheSpec,
)
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_kvcompress.config.reading import CONFIG_KEY, parse_config
from vllm_kvcompress.host.model_checks import check_layer, is_latent
from vllm_kvcompress.kernels.cache.block_tables import BlockTables
from vllm_kvcompress.kernels.cache.rows import CacheRows
from vllm_kvcompress.kernels.dispatch import backend_of
from vllm_kvcompress.messages import StepPlan, StepReport
from vllm_kvcompress.plans import CompactionPlan
from vllm_kvcompress.worker.batch import CompactionJob
from vllm_kvcompress.worker.built_layers import looked_at_once_built
from vllm_kvcompress.worker.cache_numbers import numbers_of
from vllm_kvcompress.worker.compaction.compactor import Compactor, QuerySources
from vllm_kvcompress.worker.compaction.faults import StepFaults
from vllm_kvcompress.worker.compaction.layer_parts import LayerParts, check_parts, softmax_terms
from vllm_kvcompress.worker.compaction.timer import CompactionTimer
from vllm_kvcompress.worker.compaction.warm_up import warm_up, warm_up_steps
from vllm_kvcompress.worker.fault_report import FaultReport
from vllm_kvcompress.worker.features import Feature, make_features
from vllm_kvcompress.worker.group_metadata import without_schedule
from vllm_kvcompress.worker.host_buffers import pools_for_writes_per_step
from vllm_kvcompress.worker.latent import cache_of, latent_layout, query_size, watch_queries
from vllm_kvcompress.worker.layer_specs import CompactedLayers
from vllm_kvcompress.worker.layout.base import CacheLayout
from vllm_kvcompress.worker.layout.layer_cache import LayerCache
from vllm_kvcompress.worker.layout.packed import cpu_layout
from vllm_kvcompress.worker.layout.strided import StridedLayout
from vllm_kvcompress.worker.model_state import CompressionStateMixin, compressed
from vllm_kvcompress.worker.modes import MODES

logger = init_logger(f"vllm.{__name__}")


class CompressionRunnerMixin(GPUModelRunner):
    """Compression on top of model runner V2; comes first in the bases.

    Attributes
    ----------
    features : list[Feature]
        Modes that the server's setting needs.
    compactor : Compactor
        Runs plans; exists once the KV cache does.
    tables : BlockTables
        The target's own block tables, likewise.
    """

    model_state: CompressionStateMixin
    features: list[Feature]
    compactor: Compactor
    tables: BlockTables

    # --- set-up ---------------------------------------------------------------------------

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then swap in our model state and watch the attention layers."""
        config = parse_config(self.vllm_config.additional_config[CONFIG_KEY])
        assert config is not None, "this runner is installed only when compression is on"
        self.features = make_features(MODES, config, self)
        for feature in self.features:
            feature.before_load()
        with looked_at_once_built(self._check_layers):
            super().load_model(*args, **kwargs)
        self._check_layers()  # a loader may make its model in another way
        self.model_state = state = compressed(type(self.model_state))(
            config, self.features, self.vllm_config, self.model, self.encoder_cache, self.device
        )
        for feature in self.features:
            feature.after_load()
        self._timer = CompactionTimer(self.device)
        self._fault_report = FaultReport(get_pp_group().is_last_rank)
        for name, layer in self.compacted_layers.by_name().items():
            state.ring.add_layer(name, layer.num_heads, query_size(layer), self.dtype)
            watch_queries(state.taps, name, layer)
            # What features do in a layer is done to keys and values.
            for feature in () if is_latent(layer) else self.features:
                feature.watch_layer(name, layer)
        if state.ring.num_bytes:
            logger.info("KV compression: %s", state.ring)

    def _check_layers(self) -> None:
        for name, layer in self.compacted_layers.by_name().items():
            check_layer(name, layer)

    @cached_property
    def compacted_layers(self) -> CompactedLayers:
        """The layers that plans are about."""
        return CompactedLayers(self.vllm_config)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Give every layer that is compacted the spec of its layer group."""
        config = self.model_state.config.layer_groups
        return self.compacted_layers.specs(super().get_kv_cache_spec(), config)

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        """Build the compactor once the caches exist."""
        with pools_for_writes_per_step(2, self.vllm_config.max_concurrent_batches):
            super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if len(kv_cache_config.kv_cache_groups) > 1:
            without_schedule(self.attn_groups)
        self._physical_slots = backend_of(self.device).physical_slots
        self.tables = BlockTables.of(
            [table.gpu for table in self.block_tables.block_tables], self.block_tables.block_sizes
        )
        state = self.model_state
        caches = self._layer_caches()
        check_parts(caches, state.config, self.model_config)
        tp_group = get_tp_group()
        # Ranks beyond the number of KV heads hold copies: rank r of t holds head r * heads // t.
        model = self.model_config
        num_kv_heads = 1 if model.use_mla else model.get_total_num_kv_heads()
        self.compactor = Compactor(
            layers=sorted(caches, key=lambda cache: cache.index),
            num_layers=len(self.compacted_layers),
            sources=QuerySources(state.window, state.prompt_queries, state.ring),
            device=self.device,
            all_reduce=tp_group.all_reduce,
            num_ranks=tp_group.world_size,
            first_kv_head=tp_group.rank_in_group * num_kv_heads // tp_group.world_size,
            shares_head=model.use_mla,
        )
        state.prompt_queries.bind(self.compactor.layers, self._rows_so_far)
        for feature in self.features:
            feature.bind(kv_cache_config)

    def _layer_caches(self) -> list[LayerCache]:
        layers = self.compacted_layers.by_name()
        parts = LayerParts(self.model, self.model_config, self.device)
        return [
            LayerCache(
                name=name,
                index=self.compacted_layers.place(name),
                group=group,
                scale=layers[name].impl.scale,
                terms=softmax_terms(layers[name].impl),
                layout=self._layout(layers[name], spec.kv_cache_spec.block_size),
                cache=cache_of(layers[name]),
                rotary=parts.rotary(name),
                output_projection=parts.output_projection(
                    name, layers[name].num_heads, layers[name].head_size
                ),
            )
            for group, spec in enumerate(self.kv_cache_config.kv_cache_groups)
            for name in spec.layer_names
            if name in layers
        ]

    def _layout(self, layer: Attention | MLAAttention, block_size: int) -> CacheLayout:
        if is_latent(layer):
            return latent_layout(layer, block_size, in_place=True)
        return StridedLayout(layer.head_size, block_size, numbers_of(layer))

    def warm_up_compaction(self) -> None:
        """Launch once what only compressed requests launch; their rows here are dummies."""
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        samples = {
            name: torch.zeros(1, layer.num_heads, query_size(layer), **options)
            for name, layer in self.compacted_layers.by_name().items()
        }
        for sample in samples.values():
            self.model_state.window.warm_up(sample)
        state = self.model_state
        assert state.lengths is not None
        warm_up_steps(
            state.lengths, state.ring, self._physical_slots, self.tables,
            self.block_tables.slot_mappings,
        )  # fmt: skip
        configs = (state.config, *state.config.by_task.values())
        sizes = self.block_tables.block_sizes
        block_size = max(sizes[layer.group] for layer in self.compactor.layers)
        for feature in self.features:
            feature.warm_up(configs, block_size, samples)
        queries = {name: sample[0] for name, sample in samples.items()}
        warm_up(self.compactor, configs, block_size, queries)

    # --- one step -------------------------------------------------------------------------

    def gather_batch_req_state(
        self, scheduler_output: SchedulerOutput, dummy_run: bool
    ) -> tuple[Any, int | None]:
        """Keep steps that need Python in attention out of full CUDA graphs, where it does not run.

        Queries are recorded there, and features may have work there. A prompt's last chunk of one
        token looks like a decode to the host. Without a uniform token count it is dispatched to a
        piecewise graph or runs eagerly.
        """
        batch_state, uniform_token_count = super().gather_batch_req_state(
            scheduler_output, dummy_run
        )
        if batch_state is not None and self._needs_python(batch_state):
            batch_state = batch_state._replace(decode_graph_eligible=False)
            uniform_token_count = None
        return batch_state, uniform_token_count

    def _needs_python(self, batch_state: Any) -> bool:
        if self.model_state.awaits_queries and self._captures_queries(batch_state):
            return True
        return any(feature.blocks_full_graph(batch_state) for feature in self.features)

    def _captures_queries(self, batch_state: Any) -> bool:
        computed = self.req_states.num_computed_tokens_np[batch_state.idx_mapping_np]
        return any(
            self.model_state.captures_queries(request_id, int(start), int(count))
            for request_id, start, count in zip(
                batch_state.req_ids, computed, batch_state.num_scheduled_tokens, strict=True
            )
        )

    def prepare_attn(
        self, input_batch: InputBatch
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Replace logical by physical slots where a request of the batch is compacted."""
        any_compacted = self.model_state.begin_batch(input_batch)
        block_tables, slot_mappings = super().prepare_attn(input_batch)
        if any_compacted:
            assert self.model_state.lengths is not None
            self._physical_slots(
                positions=input_batch.positions[: input_batch.num_tokens],
                query_start_loc=input_batch.query_start_loc,
                idx_mapping=input_batch.idx_mapping,
                evicted=self.model_state.lengths.evicted.gpu,
                tables=self.tables,
                out=slot_mappings,
            )
        for feature in self.features:
            feature.begin_batch(input_batch, any_compacted)
        return block_tables, slot_mappings

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Run the step, then compact what the scheduler planned for it."""
        step = StepPlan.of(scheduler_output)
        self.model_state.setups = dict(step.setups)
        self.model_state.query_slots.update(step.query_slots)
        for feature in self.features:
            feature.begin_step(step)
        output = super().execute_model(scheduler_output, *args, **kwargs)
        for feature in self.features:
            feature.end_batch()
        self.model_state.window.end_batch()
        self.model_state.prompt_queries.end_batch()
        if step.plans:
            with self._timer:
                faults = self._compact(step.plans)
            output = self._fault_report.begin(faults, self.compactor, output, *args)
            for feature in self.features:
                feature.after_compaction()
            # At once: left for the next step, the write could race with a new owner of the row.
            # The second write of this step, for which the pools were made deep enough.
            self.block_tables.apply_staged_writes()
        self.model_state.ring.end_batch()
        return output

    def _rows_so_far(
        self, layer: LayerCache, req_index: int, num_tokens: int, queries: torch.Tensor
    ) -> CacheRows:
        """First tokens of a request that was never compacted, and the queries of the last."""
        num_blocks = -(-num_tokens // self.block_tables.block_sizes[layer.group])
        blocks = self.block_tables.block_tables[layer.group].gpu[req_index, :num_blocks]
        return layer.layout.rows_so_far(
            layer.cache(), blocks, num_tokens, queries, layer.scale, layer.terms
        )

    def _compact(self, plans: Sequence[CompactionPlan]) -> StepFaults:
        """Carry plans out, whatever goes wrong: the scheduler counts on every row's length."""
        configs, rows = self.model_state.request_configs, self.req_states.req_id_to_index
        jobs = [CompactionJob(p, configs[p.request_id], rows[p.request_id]) for p in plans]
        faults = StepFaults((plan.request_id for plan in plans), self.device)
        self.compactor.faults = faults
        # The blocks of a linked view are there already, and an equal request's survivors.
        self.compactor.run([job for job in jobs if job.plan.purpose.is_copied])
        for feature in self.features:
            with faults.of(jobs):
                feature.compact(jobs)
        self.compactor.faults = None
        for job in jobs:
            self.model_state.forget_queries(job.plan.request_id, job.plan.position)
            if not job.plan.purpose.is_view:
                self._rewrite_row(job)
        return faults

    def _rewrite_row(self, job: CompactionJob) -> None:
        assert self.model_state.lengths is not None
        for group, plan in enumerate(job.plan.groups):
            if plan is not None:
                row = plan.block_row
                self.block_tables.block_tables[group].stage_write(job.req_index, 0, row)
                self.block_tables.num_blocks.np[group, job.req_index] = len(row)
                self.model_state.lengths.add_evicted(group, job.req_index, plan.lengths.evicted)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Tell a scheduler that waits for them how many drafts each request really has."""
        drafts = super().take_draft_token_ids()
        if drafts is not None:
            for feature in self.features:
                drafts.draft_token_ids = feature.trim_drafts(drafts.req_ids, drafts.draft_token_ids)
        return drafts

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Send what was measured with the step's output."""
        output = super().sample_tokens(*args, **kwargs)
        # With asynchronous scheduling the step's output is inside of what is returned.
        carrier = getattr(output, "model_runner_output", output)
        late = list[Any]()
        if carrier is not None:
            seconds, measured = self._timer.take(), dict[str, Any]()
            for feature in self.features:
                measured.update(feature.report())
                late += feature.late_report()
            # Nobody reads other stages', and vLLM may return one object for all.
            if (seconds or measured) and self.is_last_pp_rank:
                StepReport(seconds=tuple(seconds), **measured).attach(carrier)
        self._fault_report.end(output, late)
        return output


class CompressedGPUModelRunner(CompressionRunnerMixin, GPUModelRunner):
    """Model runner V2 on a GPU."""


class CompressedCPUModelRunner(CompressionRunnerMixin, CPUModelRunner):
    """Model runner V2 on a CPU, where vLLM's own attention packs blocks."""

    def _layout(self, layer: Attention | MLAAttention, block_size: int) -> CacheLayout:
        if is_latent(layer):
            return latent_layout(layer, block_size, in_place=False)
        if layer.get_attn_backend().get_name() != "CPU_ATTN":
            return super()._layout(layer, block_size)
        return cpu_layout(layer.isa, layer.head_size, numbers_of(layer))  # type: ignore[attr-defined]

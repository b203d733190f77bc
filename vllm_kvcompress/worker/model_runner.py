"""Model runner mix-in: installs the model state, physical slots, and compaction after the forward.

Works on vLLM's model runner V2, on CPU and GPU alike.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_kvcompress.config.reading import CONFIG_KEY, parse_config
from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.host.checks import check_layer, has_plain_rotary
from vllm_kvcompress.kernels.cache.block_tables import BlockTables
from vllm_kvcompress.kernels.cache.rows import CacheRows
from vllm_kvcompress.kernels.dispatch import backend_of
from vllm_kvcompress.lengths.budgets import layer_groups
from vllm_kvcompress.messages import StepPlan
from vllm_kvcompress.plans import CompactionPlan
from vllm_kvcompress.spec import CompressedAttentionSpec
from vllm_kvcompress.worker.codebook_meter import CodebookMeter
from vllm_kvcompress.worker.codebook_reader import CodebookReader, read_codebooks
from vllm_kvcompress.worker.compactor import Compactor, QuerySources
from vllm_kvcompress.worker.draft_views import DraftViews
from vllm_kvcompress.worker.group_batch import CompactionJob
from vllm_kvcompress.worker.group_metadata import without_schedule
from vllm_kvcompress.worker.host_buffers import keep_token_ids_on_host, pools_for_writes_per_step
from vllm_kvcompress.worker.layer_cache import LayerCache
from vllm_kvcompress.worker.layer_parts import find_output_projection, find_rotary, require_parts
from vllm_kvcompress.worker.layout import CacheLayout, StridedLayout
from vllm_kvcompress.worker.model_state import CompressedModelState
from vllm_kvcompress.worker.packed_layout import cpu_layout
from vllm_kvcompress.worker.timer import CompactionTimer
from vllm_kvcompress.worker.typical_acceptance import TypicalAcceptanceSampler
from vllm_kvcompress.worker.view_speculator import ViewSpeculator
from vllm_kvcompress.worker.warm_up import warm_up, warm_up_steps

logger = init_logger(f"vllm.{__name__}")


class CompressionRunnerMixin(GPUModelRunner):
    """Compression on top of model runner V2; comes first in the bases."""

    model_state: CompressedModelState
    compactor: Compactor

    # --- set-up ---------------------------------------------------------------------------

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then swap in our model state and watch the attention layers."""
        config = parse_config(self.vllm_config.additional_config[CONFIG_KEY])
        if config is not None and config.drafts:
            keep_token_ids_on_host(self.req_states)
        super().load_model(*args, **kwargs)
        if type(self.model_state) is not DefaultModelState:
            raise UnsupportedModelError(
                f"KV compression supports models with vLLM's default model state; this one uses "
                f"{type(self.model_state).__name__}. Start without --kv-compression."
            )
        self.model_state = CompressedModelState(
            self.vllm_config, self.model, self.encoder_cache, self.device
        )
        if self.model_state.config.drafts:
            # In the place of the speculator that vLLM built for the configuration we gave it:
            # it has no name for one of ours.
            self.speculator = ViewSpeculator(
                self.vllm_config, self.model, self.model_state, self.device
            )
            thresholds = self.model_state.config.draft.typical_thresholds
            if thresholds is not None:
                self.rejection_sampler = TypicalAcceptanceSampler(
                    self.sampler, self.speculative_config, self.device, *thresholds
                )
        self._timer = CompactionTimer(self.device)
        self._meter = CodebookMeter(self.device)
        self._reader: CodebookReader | None = None
        state = self.model_state
        for name, layer in self._attention_layers().items():
            check_layer(name, layer)
            state.ring.add_layer(name, layer.num_heads, layer.head_size, self.dtype)
            state.taps.watch(name, layer.impl)
            read_codebooks(name, layer.impl, lambda: self._reader)
        if state.ring.num_bytes:
            logger.info("KV compression: %s", state.ring)

    def _attention_layers(self) -> dict[str, Attention]:
        """The target's; a draft model's are left as they are."""
        layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        return {name: layer for name, layer in layers.items() if not layer.is_draft_layer}

    def _num_layers(self) -> int:
        return self.model_config.hf_text_config.num_hidden_layers

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Give every layer the spec of its layer group; a draft model's layers have none."""
        groups = layer_groups(self._num_layers(), self.model_state.config.layer_groups)
        layers = self.vllm_config.compilation_config.static_forward_context
        specs: dict[str, KVCacheSpec] = {}
        for name, spec in super().get_kv_cache_spec().items():
            if type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
                raise UnsupportedModelError(
                    f"KV compression supports full-attention layers only; {name} has a "
                    f"{type(spec).__name__}. Start without --kv-compression."
                )
            group = None if layers[name].is_draft_layer else groups[extract_layer_index(name)]
            specs[name] = CompressedAttentionSpec.from_full(spec, group)
        return specs

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        """Build the compactor once the caches exist."""
        with pools_for_writes_per_step(2, self.vllm_config.max_concurrent_batches):
            super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if len(kv_cache_config.kv_cache_groups) > 1:
            without_schedule(self.attn_groups)
        self._physical_slots = backend_of(self.device).physical_slots
        self._tables = BlockTables.of(
            [table.gpu for table in self.block_tables.block_tables], self.block_tables.block_sizes
        )
        state = self.model_state
        if isinstance(self.speculator, ViewSpeculator):
            assert state.lengths is not None
            state.views = DraftViews(self._tables.tensors, self.block_tables.block_sizes)
            self.speculator.bind(kv_cache_config, self.attn_groups, self._tables)
        caches = self._layer_caches()
        self._check_parts(caches)
        tp_group = get_tp_group()
        # Ranks beyond the number of KV heads hold copies: rank r of t holds head r * heads // t.
        num_kv_heads = self.model_config.get_total_num_kv_heads()
        self.compactor = Compactor(
            layers=sorted(caches, key=lambda cache: cache.index),
            num_layers=self._num_layers(),
            sources=QuerySources(state.window, state.prompt_queries, state.ring),
            device=self.device,
            all_reduce=tp_group.all_reduce,
            num_ranks=tp_group.world_size,
            first_kv_head=tp_group.rank_in_group * num_kv_heads // tp_group.world_size,
            entry_counts=torch.zeros(
                self._num_layers(), self.max_num_reqs, 2, caches[0].cache().shape[1],
                dtype=torch.int32, device=self.device,
            ),
        )  # fmt: skip
        state.prompt_queries.bind(self.compactor.layers, self._rows_so_far)
        assert state.codebooks is not None
        self._reader = CodebookReader(state.codebooks, caches, self.device)

    def _layer_caches(self) -> list[LayerCache]:
        layers = self._attention_layers()
        return [
            LayerCache(
                name=name,
                index=extract_layer_index(name),
                group=group,
                scale=layers[name].impl.scale,
                layout=self._layout(layers[name], spec.kv_cache_spec.block_size),
                cache=partial(getattr, layers[name], "kv_cache"),
                rotary=find_rotary(self.model, name, self.device),
                output_projection=find_output_projection(
                    self.model, name, layers[name].num_heads, layers[name].head_size
                ),
            )
            for group, spec in enumerate(self.kv_cache_config.kv_cache_groups)
            for name in spec.layer_names
            if name in layers
        ]

    def _check_parts(self, layers: list[LayerCache]) -> None:
        """Refuse models around whose layers a policy would not find what it needs.

        A request may name any preset, so the output projection must be there whatever the server's
        policy; rotary embeddings are checked against the model's configuration, on admission too.
        """
        config = self.model_state.config
        policies = [each.build_policy() for each in (config, *config.by_task.values())]
        expects_rotary = has_plain_rotary(self.model_config)
        for layer in layers:
            for policy in policies:
                require_parts(policy, layer.rotary, layer.output_projection, layer.name)
            if layer.output_projection is None or (expects_rotary and layer.rotary is None):
                raise UnsupportedModelError(
                    f"--kv-compression: around layer {layer.name} there is no output projection or "
                    "rotary embedding of a kind that is known: choose another model, or drop "
                    "--kv-compression."
                )

    def _layout(self, layer: Attention, block_size: int) -> CacheLayout:
        return StridedLayout(layer.head_size, block_size)

    def warm_up_compaction(self) -> None:
        """Launch once what only compressed requests launch; their rows here are dummies."""
        samples = {
            name: torch.zeros(1, layer.num_heads, layer.head_size, dtype=self.dtype).to(self.device)
            for name, layer in self._attention_layers().items()
        }
        for sample in samples.values():
            self.model_state.window.warm_up(sample)
        state = self.model_state
        assert state.lengths is not None
        warm_up_steps(
            state.lengths, state.ring, self._physical_slots, self._tables,
            self.block_tables.slot_mappings,
        )  # fmt: skip
        config = self.model_state.config
        configs = (config, *config.by_task.values())
        if any(each.codebook for each in configs):
            assert self._reader is not None
            self._reader.warm_up(samples)
        warm_up(
            self.compactor,
            configs,
            max(self.block_tables.block_sizes[layer.group] for layer in self.compactor.layers),
            {name: sample[0] for name, sample in samples.items()},
        )

    # --- one step -------------------------------------------------------------------------

    def gather_batch_req_state(
        self, scheduler_output: SchedulerOutput, dummy_run: bool
    ) -> tuple[Any, int | None]:
        """Keep steps that need Python in attention out of full CUDA graphs, where it does not run.

        Queries are recorded there, and codebooks read. A prompt's last chunk of one token looks
        like a decode to the host. Without a uniform token count it is dispatched to a piecewise
        graph or runs eagerly.
        """
        batch_state, uniform_token_count = super().gather_batch_req_state(
            scheduler_output, dummy_run
        )
        if batch_state is not None and (
            self._captures_queries(batch_state) or self._reads_codebooks(batch_state)
        ):
            batch_state = batch_state._replace(decode_graph_eligible=False)
            uniform_token_count = None
        return batch_state, uniform_token_count

    def _captures_queries(self, batch_state: Any) -> bool:
        if not self.model_state.awaits_queries:
            return False
        computed = self.req_states.num_computed_tokens_np[batch_state.idx_mapping_np]
        return any(
            self.model_state.captures_queries(request_id, int(start), int(count))
            for request_id, start, count in zip(
                batch_state.req_ids, computed, batch_state.num_scheduled_tokens, strict=True
            )
        )

    def _reads_codebooks(self, batch_state: Any) -> bool:
        codebooks = self.model_state.codebooks
        return codebooks is not None and codebooks.has_book(batch_state.idx_mapping_np)

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
                tables=self._tables,
                out=slot_mappings,
            )
            self.model_state.begin_codebooks(
                input_batch, self._tables.tensors, self.block_tables.block_sizes
            )
        return block_tables, slot_mappings

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Run the step, then compact what the scheduler planned for it."""
        step = StepPlan.of(scheduler_output)
        self.model_state.setups = dict(step.setups)
        self.model_state.query_slots.update(step.query_slots)
        self.model_state.num_draft_steps = step.num_draft_steps
        self.model_state.drop_views(step.views_given_up)
        output = super().execute_model(scheduler_output, *args, **kwargs)
        if self.model_state.codebooks is not None:
            self.model_state.codebooks.end_batch()
        self.model_state.window.end_batch()
        self.model_state.prompt_queries.end_batch()
        if step.plans:
            with self._timer:
                self._compact(step.plans)
            self._meter.add(self.compactor.codebooks.take_measures())
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
        return layer.layout.rows_so_far(layer.cache(), blocks, num_tokens, queries, layer.scale)

    def _compact(self, plans: Sequence[CompactionPlan]) -> None:
        configs, rows = self.model_state.request_configs, self.req_states.req_id_to_index
        jobs = [CompactionJob(p, configs[p.request_id], rows[p.request_id]) for p in plans]
        self.compactor.run([job for job in jobs if not job.plan.is_linked])
        blocks = self.compactor.choose_blocks([job for job in jobs if job.plan.is_linked])
        evicted = {
            plan.request_id: [each.lengths.evicted if each else 0 for each in plan.groups]
            for plan in plans
            if not plan.is_view
        }
        for plan in plans:
            row = rows[plan.request_id]
            self.model_state.forget_queries(plan.request_id)
            if plan.is_view:
                assert self.model_state.views is not None
                linked = {
                    group: ids for (name, group), ids in blocks.items() if name == plan.request_id
                }
                self.model_state.views.add(row, plan.groups, evicted.get(plan.request_id), linked)
            else:
                self._rewrite_row(plan, row)

    def _rewrite_row(self, plan: CompactionPlan, req_index: int) -> None:
        assert self.model_state.lengths is not None and self.model_state.codebooks is not None
        for group, group_plan in enumerate(plan.groups):
            if group_plan is None:
                continue
            row = group_plan.block_row
            self.block_tables.block_tables[group].stage_write(req_index, 0, row)
            self.block_tables.num_blocks.np[group, req_index] = len(row)
            self.model_state.lengths.add_evicted(group, req_index, group_plan.lengths.evicted)
            if group_plan.lengths.book is not None:
                self.model_state.codebooks.set_book(group, req_index, group_plan.lengths.book)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Tell a scheduler that waits for them how many drafts each request really has."""
        drafts = super().take_draft_token_ids()
        if drafts is not None and isinstance(self.speculator, ViewSpeculator):
            counts = self.speculator.counts
            drafts.draft_token_ids = [
                tokens[: counts.get(request_id, 0)]
                for request_id, tokens in zip(drafts.req_ids, drafts.draft_token_ids, strict=True)
            ]
        return drafts

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Send the times of compactions, and measures of codebooks, with the step's output."""
        output = super().sample_tokens(*args, **kwargs)
        carrier = getattr(output, "model_runner_output", output)
        if carrier is None:
            return output
        if seconds := list(self._timer.take()):
            carrier.kv_compression_seconds = seconds
        if measures := self._meter.take():
            carrier.kv_codebook_measures = measures
        return output


class CompressedGPUModelRunner(CompressionRunnerMixin, GPUModelRunner):
    """Model runner V2 on a GPU."""


class CompressedCPUModelRunner(CompressionRunnerMixin, CPUModelRunner):
    """Model runner V2 on a CPU, where vLLM's own attention packs blocks."""

    def _layout(self, layer: Attention, block_size: int) -> CacheLayout:
        if layer.get_attn_backend().get_name() != "CPU_ATTN":
            return super()._layout(layer, block_size)
        return cpu_layout(layer.isa, layer.head_size)  # type: ignore[attr-defined]

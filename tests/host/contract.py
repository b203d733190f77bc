"""What the tests of our contract with vLLM look at, and cannot find out by themselves."""

WHERE_CALLS_ARE = ("v1", "engine", "entrypoints")
"""Folders of vLLM whose calls count: our classes are in engine core, workers and API server."""

RECEIVERS = {
    "Scheduler": {"scheduler"},
    "FullAttentionManager": {"manager"},
    "MLAAttentionSpec": {"layer_specs", "kv_cache_spec_values", "specs", "first_spec", "spec"},
    "FullAttentionSpec": {"layer_specs", "kv_cache_spec_values", "specs", "first_spec", "spec"},
    "GPUModelRunner": {"model_runner", "runner"},
    "CPUModelRunner": {"model_runner", "runner"},
    "DefaultModelState": {"model_state"},
    "BaseSpeculator": {"speculator"},
    "RejectionSampler": {"rejection_sampler"},
    "Worker": {"worker"},
    "CPUWorker": {"worker", "driver_worker"},
    "EngineArgs": {"EngineArgs", "AsyncEngineArgs", "engine_args"},
    "InputProcessor": {"input_processor"},
    "KVCacheManager": {"kv_cache_manager"},
    "StatLoggerManager": {"logger_manager"},
}
"""By the host's class that we replace: names under which vLLM holds such an object. ``self`` in the
class, its bases and its subclasses counts, too."""

CALLED_WITHOUT_ARGUMENTS = {
    "Worker.determine_available_memory": "by name, through the executor's collective_rpc",
}
"""Overrides of which no call is found, and how they are called."""

WRAPPED = {
    "vllm.engine.arg_utils:EngineArgs.add_cli_args": "_add_cli_args",
    "vllm.engine.arg_utils:EngineArgs.from_cli_args": "_from_cli_args",
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": "_create_engine_config",
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": "_process_inputs",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots": "_allocate_slots",
    "vllm.v1.metrics.loggers:StatLoggerManager.record": "_record",
    "vllm.v1.metrics.loggers:StatLoggerManager.__init__": "_init_stat_loggers",
}
"""Functions that host/hooks.py wraps, and what makes the wrapper."""

PARAMETERS: dict[str, tuple[str, ...]] = {
    "vllm.model_executor.model_loader.base_loader:BaseModelLoader.create_model": (
        "self",
        "vllm_config",
        "model_config",
        "prefix",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": ("self", "throttle_prefills"),
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler._free_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request": (
        "self",
        "request",
        "timestamp",
        "drop_stale_output",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead": (
        "self",
        "request",
        "num_computed_tokens",
        "num_new_tokens",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler._get_local_prefix_cache_hit": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": (
        "self",
        "scheduler_output",
        "model_runner_output",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.make_stats": ("self",),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.truncate_computed_blocks": (
        "self",
        "blocks",
        "num_computed_tokens",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.get_num_blocks_to_allocate": (
        "self",
        "request_id",
        "num_tokens",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.allocate_new_blocks": (
        "self",
        "request_id",
        "num_tokens",
        "num_tokens_main_model",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.cache_blocks": (
        "self",
        "request",
        "num_tokens",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.pop_blocks_for_free": (
        "self",
        "request_id",
    ),
    # Not overridden, called: how often a host buffer may be written before kernels have read it.
    "vllm.v1.worker.gpu.buffer_utils:set_default_max_concurrency": ("n",),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.load_model": ("self",),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.get_kv_cache_spec": ("self",),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.initialize_kv_cache": (
        "self",
        "kv_cache_config",
    ),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.gather_batch_req_state": (
        "self",
        "scheduler_output",
        "dummy_run",
    ),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_attn": ("self", "input_batch"),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model": ("self", "scheduler_output"),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens": ("self", "grammar_output"),
    "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.propose": (
        "self",
        "input_batch",
        "attn_metadata",
        "slot_mappings",
        "last_hidden_states",
        "aux_hidden_states",
        "num_sampled",
        "num_rejected",
        "last_sampled",
        "next_prefill_tokens",
        "temperature",
        "seeds",
    ),
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler.__init__": (
        "self",
        "sampler",
        "spec_config",
        "device",
    ),
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler._verify": (
        "self",
        "logits",
        "draft_logits",
        "draft_sampled",
        "pos",
        "cu_num_logits",
        "idx_mapping",
        "idx_mapping_np",
        "expanded_idx_mapping",
        "expanded_local_pos",
        "seq_lens_upper_bound_np",
        "verify_draft_sampled",
    ),
    # Not overridden, called with these: the logits that vLLM's own samplers see, and its noise.
    "vllm.v1.worker.gpu.sample.sampler:Sampler.apply_sampling_params": (
        "self",
        "logits",
        "expanded_idx_mapping",
        "idx_mapping",
        "idx_mapping_np",
        "pos",
        "input_ids",
        "expanded_local_pos",
        "seq_lens_upper_bound_np",
    ),
    "vllm.v1.worker.gpu.sample.gumbel:gumbel_sample": (
        "logits",
        "expanded_idx_mapping",
        "temperature",
        "seed",
        "pos",
        "apply_temperature",
        "is_drafting",
    ),
    "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.init_cudagraph_manager": (
        "self",
        "cudagraph_mode",
    ),
    "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.capture": ("self",),
    # Not overridden, called with these: CUDA graphs of draft steps.
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.__init__": (
        "self",
        "vllm_config",
        "device",
        "cudagraph_mode",
        "decode_query_len",
    ),
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.capture": (
        "self",
        "create_forward_fn",
        "progress_bar_desc",
    ),
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.dispatch": (
        "self",
        "num_reqs",
        "num_tokens",
        "uniform_token_count",
        "num_active_loras",
    ),
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.run_fullgraph": ("self", "desc"),
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.needs_capture": ("self",),
    "vllm.v1.worker.gpu.cudagraph_utils:CreateForwardFn.__call__": ("self", "desc", "warmup"),
    "vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids": ("self", "draft_token_ids"),
    "vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule": ("self", "scheduler_output"),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.take_draft_token_ids": ("self",),
    "vllm.v1.worker.gpu_worker:Worker._make_model_runner": ("self",),
    "vllm.v1.worker.gpu_worker:Worker._maybe_activate_jit_monitor": ("self",),
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.add_request": (
        "self",
        "req_index",
        "new_req_data",
    ),
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.remove_request": ("self", "req_id"),
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.initialize_kv_cache": (
        "self",
        "kv_cache_config",
        "block_tables",
    ),
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn": (
        "self",
        "input_batch",
        "cudagraph_mode",
        "block_tables",
        "slot_mappings",
        "attn_groups",
    ),
    # Not overridden, called: frequencies, projections without all-reduce, the tokenizer.
    "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbeddingBase._compute_inv_freq": (
        "self",
        "base",
    ),
    "vllm.model_executor.layers.linear:UnquantizedLinearMethod.apply": (
        "self",
        "layer",
        "x",
        "bias",
    ),
    "vllm.tokenizers:cached_tokenizer_from_config": ("model_config",),
}
"""Functions that we override or call, and their first parameters, which we pass by place."""

FIELDS = {
    "vllm.config.speculative:SpeculativeConfig": {
        "method",
        "draft_model_config",
        "kv_cache_dtype",
        "draft_tensor_parallel_size",
        "enable_adaptive_verification",
    },
    "vllm.v1.worker.gpu.model_runner:BatchReqState": {
        "decode_graph_eligible",
        "idx_mapping_np",
        "num_scheduled_tokens",
        "req_ids",
    },
    "vllm.v1.worker.gpu.cudagraph_utils:AttentionState": {"attn_metadata", "slot_mappings"},
    "vllm.v1.worker.gpu.input_batch:InputBatch": {
        "req_ids",
        "idx_mapping",
        "idx_mapping_np",
        "num_tokens",
        "num_scheduled_tokens",
        "query_start_loc",
        "query_start_loc_np",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "num_computed_tokens_np",
        "positions",
    },
    "vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor": {
        "cg_mode",
        "num_tokens",
        "num_reqs",
        "uniform_token_count",
    },
    "vllm.v1.core.sched.output:NewRequestData": {"req_id", "prompt_token_ids", "sampling_params"},
    "vllm.v1.metrics.stats:SchedulerStats": {"kv_connector_stats"},
    "vllm.v1.core.sched.output:SchedulerOutput": {
        "num_scheduled_tokens",
        "scheduled_new_reqs",
        "scheduled_spec_decode_tokens",
    },
}
"""Fields of the host's dataclasses that we read."""

ATTRIBUTES = {
    "vllm.v1.core.sched.scheduler:Scheduler": {
        "block_size", "kv_cache_config", "kv_cache_manager", "max_model_len",
        "num_lookahead_tokens", "num_spec_tokens", "requests", "running", "vllm_config",
    },
    "vllm.v1.core.kv_cache_manager:KVCacheManager": {
        "block_pool", "coordinator", "truncate_computed_blocks", "watermark_blocks",
    },
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator": {"single_type_managers"},
    "vllm.v1.core.block_pool:BlockPool": {
        "free_blocks", "get_new_blocks", "get_num_free_blocks", "num_gpu_blocks",
    },
    "vllm.v1.core.kv_cache_utils:KVCacheBlock": {"block_id", "is_null", "ref_cnt"},
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager": {
        "block_pool", "block_size", "enable_caching", "kv_cache_group_id", "kv_cache_spec",
        "records_new_block_ids", "req_to_blocks",
    },
    "vllm.v1.request:Request": {
        "block_hashes", "mm_features", "num_computed_tokens", "num_output_placeholders",
        "num_tokens", "request_id", "resumable", "spec_token_ids", "status",
    },
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": {
        "attn_groups", "block_tables", "kv_cache_config", "max_model_len", "max_num_reqs",
        "model_state", "rejection_sampler", "req_states", "sampler", "speculator",
    },
    "vllm.v1.worker.gpu.block_table:BlockTables": {
        "apply_staged_writes", "block_sizes", "block_tables", "num_blocks", "slot_mappings",
    },
    "vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor": {"gpu", "stage_write"},
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase": {"is_draft_layer"},
    "vllm.model_executor.layers.linear:RowParallelLinear": {
        "input_size_per_partition", "output_size", "params_dtype", "quant_method",
    },
    "vllm.v1.worker.gpu.states:RequestState": {
        "all_token_ids", "num_computed_tokens_np", "req_id_to_index",
    },
    "vllm.config:VllmConfig": {
        "additional_config", "cache_config", "compilation_config", "ec_transfer_config",
        "kv_transfer_config", "lora_config", "max_concurrent_batches", "model_config",
        "num_speculative_tokens", "parallel_config", "scheduler_config", "speculative_config",
        "use_v2_model_runner", "watermark_config",
    },
    "vllm.config:ModelConfig": {
        "enable_prompt_embeds", "enable_sleep_mode", "get_total_num_kv_heads", "get_vocab_size",
        "head_dtype", "hf_text_config", "is_attention_free", "is_diffusion", "is_encoder_decoder",
        "is_hybrid", "is_mm_prefix_lm", "is_moe", "is_multimodal_model", "max_model_len",
        "multimodal_config", "runner_type", "supports_multimodal_inputs", "use_fp64_gumbel",
        "use_mla", "uses_mrope", "using_transformers_backend",
    },
    "vllm.config.multimodal:MultiModalConfig": {"is_multimodal_pruning_enabled"},
    "vllm.multimodal.inputs:MultiModalFeatureSpec": {"identifier", "mm_hash", "mm_position"},
    "vllm.multimodal.cache.base:BaseMultiModalProcessorCache": {"invalidate"},
    "vllm.renderers:BaseRenderer": {"mm_processor_cache"},
    "vllm.multimodal.inputs:PlaceholderRange": {"length", "offset"},
    "vllm.model_executor.layers.rotary_embedding.mrope:MRotaryEmbedding": {"scaling_factor"},
    "vllm.config:ParallelConfig": {
        "data_parallel_size", "decode_context_parallel_size", "pipeline_parallel_size",
        "prefill_context_parallel_size", "tensor_parallel_size", "use_ubatching", "worker_cls",
    },
    "vllm.config:SchedulerConfig": {
        "async_scheduling", "disable_hybrid_kv_cache_manager", "max_num_seqs", "scheduler_cls",
    },
}  # fmt: skip
"""What else we read of the host's objects, where no annotation of ours tells their class."""

GIVEN_LATER = {"Attention": {"isa"}}
"""Attributes that something else than the class itself sets on its objects."""

INSTALLED_ONLY = {
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn",
    "vllm.v1.worker.gpu.attn_utils:compute_mm_prefix_ranges",
}
"""Statements that 0.33 has elsewhere, in other words (`docs/host-overrides.md`): it is refused."""

TEXTS = {
    # Where places of images come from that see each other both ways: a request without its name has
    # none.
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn": (
        "req_ids=input_batch.req_ids",
        "mm_features=self.encoder_cache.mm_features",
    ),
    "vllm.v1.worker.gpu.attn_utils:compute_mm_prefix_ranges": ("mm_features.get(req_id, ())",),
    # Which layers are a draft model's.
    "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.load_model": (
        "is_draft_layer = True",
    ),
    # What is under way with asynchronous scheduling, and when it no longer is: `num_unverified`.
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule": (
        "request.num_output_placeholders += ",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": (
        "request.num_computed_tokens -= num_rejected",
        "request.num_output_placeholders -= num_rejected",
    ),
    # Blocks are hashed through the managers, which know what must not be.
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.cache_blocks": ("manager.cache_blocks(",),
    # Draft steps can be captured; vLLM's profiling drops a speculator's managers.
    "vllm.v1.worker.gpu.cudagraph_utils:profile_cudagraph_memory": ("vars(speculator)",),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.capture_model": ("self.speculator.capture()",),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.initialize_kv_cache": (
        "self.speculator.init_cudagraph_manager(cudagraph_mode)",
    ),
}
"""Statements of the host that we rely on, as ``ast.unparse`` writes them."""

IMPLEMENTATIONS = ("model_executor/layers/attention", "v1/attention/backends/composite.py")
"""Where vLLM calls the attention of a layer, whose `forward` we wrap object by object."""

FORWARD_WRAPPERS = {
    "vllm_kvcompress.worker.queries.taps:QueryTaps.watch": "forward",
    "vllm_kvcompress.worker.queries.taps:QueryTaps.watch_latent": "forward_impl",
    "vllm_kvcompress.worker.codebook.reader:read_codebooks": "forward",
}
"""Functions of ours that wrap it, or in layers of latent attention the layer's `forward_impl`."""

"""Engine features: rows of docs/compatibility.md."""

from types import SimpleNamespace

from lab.compatibility.rows import StandIn, options, refused, untried, works

FEATURES = (
    works(
        "vLLM 0.32",
        "the version that all tests run with",
        "tests/host/test_contract.py::test_overrides_stay_short",
    ),
    refused(
        "vLLM 0.33.0",
        "this release was tested with vLLM 0.32.x only, and 0.33.0 is installed, of which"
        " only the sources were read: install vllm==0.32.0",
        StandIn(version="0.33.0"),
    ),
    refused(
        "Model runner V1",
        "it works with model runner V2 only, and vLLM has chosen V1: unset "
        "VLLM_USE_V2_MODEL_RUNNER and the option that vLLM's log names",
        options(use_v2_model_runner=False),
    ),
    refused(
        "Rust front end",
        "the Rust front end takes requests without checking their vllm_xargs and shows "
        "none of our metrics: unset VLLM_USE_RUST_FRONTEND",
        StandIn(environment={"VLLM_USE_RUST_FRONTEND": "1"}),
    ),
    works(
        "Prefix caching",
        "what is hit is exact; compacted blocks are never found",
        "tests/e2e/test_requests.py::test_a_repeated_prompt_hits_the_prefix_cache",
        "tests/e2e/test_exact_prefix_cache.py::test_hashed_blocks_are_exact",
    ),
    works(
        "Chunked prefill",
        "chunks change no token",
        "tests/e2e/test_variants.py::test_chunking_does_not_matter",
    ),
    works(
        "Preemption",
        "compacted again, same tokens",
        "tests/e2e/test_pressure.py::test_preempted_requests_give_the_same_tokens",
    ),
    works(
        "Prompts larger than the pool (triggers `prompt` and `all`)",
        "served in bounded memory; what cannot fit gets HTTP 400",
        "tests/e2e/test_long_prompts.py::test_the_longest_prompt_is_served_within_the_pool",
        "tests/e2e/test_long_prompts_served.py::"
        "test_a_server_answers_long_prompts_and_refuses_what_cannot_fit",
        "tests/e2e/test_prompt_marks.py::test_tokens_are_those_of_the_replay",
    ),
    works(
        "Compression only while memory is scarce (trigger `pressure`)",
        "stock's tokens until then",
        "tests/e2e/test_pressure_trigger.py::test_with_memory_to_spare_every_token_is_stocks",
        "tests/e2e/test_pressure_trigger.py::test_a_crowd_is_compressed_as_the_reference_does",
    ),
    works(
        "The next turn of a chat (`kv_session`)",
        "goes on from the compressed cache, layer groups and ranks included; models with windowed "
        "layers, recurrent layers or MLA, drafts with a cache of their own and draft mode have no "
        "such turns (HTTP 400)",
        "tests/e2e/test_sessions.py::"
        "test_a_turn_says_what_a_reference_says_over_the_same_survivors",
        "tests/host/test_session_checks.py::test_models_of_which_no_cache_is_kept",
        "tests/host/test_session_checks.py::test_settings_that_cannot_be_continued",
    ),
    works(
        "Requests that share blocks, compacted at their marks (`shared_blocks: always`)",
        "same tokens alone and in a crowd; beside windowed layers in vLLM's scheduler only; not "
        "with trigger `pressure`, nor in draft mode",
        "tests/e2e/test_shared_blocks.py::test_tokens_do_not_depend_on_who_shares_the_blocks",
        "tests/core/test_shared_blocks.py::test_beside_windowed_layers",
        "tests/config/test_shared_blocks.py::test_settings_that_do_not_go_with_it",
    ),
    works(
        "Samples of one prompt, and other equal prompts",
        "the first is compacted, the others read its copy; also with tensor and pipeline "
        "parallelism; not with triggers that compact while decoding, nor with marks inside prompts",
        "tests/e2e/test_shared_blocks.py::test_samples_of_one_prompt_read_one_copy",
        "tests/core/test_equal_prompts.py::test_any_traffic",
    ),
    works(
        "Many questions about one text (`kv_shared_prefix`)",
        "compressed once, read by all, layer groups included; refused (HTTP 400) where chats have "
        "no next turns, and with policies that read queries",
        "tests/e2e/test_shared_prefixes.py::"
        "test_every_answer_is_the_references_alone_and_in_a_crowd",
        "tests/core/test_shared_prefixes.py::test_any_traffic",
        "tests/host/test_shared_prefix_checks.py::test_policies_that_read_queries_are_refused",
    ),
    works(
        "Asynchronous scheduling",
        "same tokens",
        "tests/e2e/test_variants.py::test_async_scheduling",
        "tests/e2e/test_decoding.py::test_async_scheduling_gives_the_same_tokens",
    ),
    works(
        "CUDA graphs: `FULL_AND_PIECEWISE`, `FULL_DECODE_ONLY`, `PIECEWISE`, none",
        "on a CPU by recorded graphs; on a GPU not run yet",
        "tests/host/test_checks.py::test_full_decode_graphs_are_welcome",
        "tests/e2e/test_requests.py::"
        "test_captured_graphs_and_real_batches_read_lengths_at_one_address",
    ),
    refused(
        "CUDA graphs: `FULL`",
        "full CUDA graphs of prefills hide the queries that policies need: set "
        "-cc.cudagraph_mode=FULL_AND_PIECEWISE (full graphs for decodes stay on)",
        options(
            "compilation_config",
            cudagraph_mode=SimpleNamespace(mixed_mode=lambda: SimpleNamespace(name="FULL")),
        ),
    ),
    refused(
        "Attention backends but CPU_ATTN, FLASH_ATTN, TRITON_ATTN",
        "layer LAYER uses the attention backend FLASHINFER: set --attention-backend to "
        "CPU_ATTN, FLASH_ATTN, TRITON_ATTN",
        StandIn(layer={"backend": "FLASHINFER"}),
    ),
    works(
        "n-gram drafts over an evicted cache",
        "same tokens",
        "tests/e2e/test_decoding.py::test_speculation_on_top_gives_the_same_tokens",
        given=options(speculative_config=SimpleNamespace(method="ngram")),
    ),
    works(
        "Draft models over an evicted cache",
        "the draft's own cache is kept whole",
        "tests/e2e/test_draft_model.py::test_drafts_give_the_same_tokens",
    ),
    works(
        "EAGLE, EAGLE 3 and MTP over an evicted cache",
        "the head's own cache is kept whole; `eagle3` was run by hand",
        "tests/e2e/test_heads_and_stages.py::test_eagle_drafts_give_the_same_tokens",
        "tests/e2e/test_heads_and_stages.py::test_mtp_drafts_give_the_same_tokens",
        "tests/host/test_speculation_checks.py::test_heads_are_welcome",
    ),
    works(
        "Draft mode",
        "tokens of stock vLLM",
        "tests/e2e/test_draft.py::test_greedy_tokens_are_those_of_stock_vllm",
        given=StandIn(setting={"preset": "snapkv", "mode": "draft"}),
    ),
    works(
        "Tensor parallelism",
        "ranks keep the same tokens, of chats (`kv_session`) and shared texts "
        "(`kv_shared_prefix`) too",
        "tests/e2e/test_tensor_parallel.py::test_two_ranks_give_the_tokens_of_one",
    ),
    works(
        "Data parallelism",
        "every engine compresses",
        "tests/e2e/test_two_engines.py::test_every_engine_compresses_and_is_counted_once",
    ),
    works(
        "Pipeline parallelism",
        "every stage compacts its own layers, of chats (`kv_session`) and shared texts "
        "(`kv_shared_prefix`) too; no drafts, codebooks, shared rankings across stages",
        "tests/e2e/test_heads_and_stages.py::test_two_pipeline_stages_give_the_same_tokens",
        given=options("parallel_config", pipeline_parallel_size=2),
    ),
    refused(
        "Context parallelism, decode",
        "--decode-context-parallel-size 2 is not supported: set it to 1",
        options("parallel_config", decode_context_parallel_size=2),
    ),
    refused(
        "Context parallelism, prefill",
        "--prefill-context-parallel-size 2 is not supported: set it to 1",
        options("parallel_config", prefill_context_parallel_size=2),
    ),
    refused(
        "Dual batch overlap",
        "dual batch overlap is not supported: remove --enable-dbo and --ubatch-size",
        options("parallel_config", use_ubatching=True),
    ),
    works(
        "Ray executor",
        "tokens and counts of one worker; run where Ray is installed",
        "tests/e2e/test_tensor_parallel.py::test_two_workers_of_ray_give_the_tokens_of_one",
        given=options("parallel_config", distributed_executor_backend="ray"),
    ),
    works(
        "LoRA, without drafts",
        "tokens of merged weights; tokens are ranked by the model's own projection",
        "tests/e2e/test_modes_of_use.py::test_compacted_adapters_give_the_tokens_of_merged_weights",
        "tests/e2e/test_modes_of_use.py::test_adapters_give_stocks_tokens",
        "tests/e2e/test_modes_of_use.py::test_adapters_are_compacted_beside_the_model_itself",
        given=options(lora_config=object()),
    ),
    refused(
        "LoRA in draft mode",
        "mode: a draft step has other rows than the step whose adapters LoRA has laid "
        "out; leave out draft mode and draft.budget, or --enable-lora.",
        StandIn(changes={"lora_config": object()}, setting={"preset": "snapkv", "mode": "draft"}),
    ),
    works(
        "fp8 KV cache, one scale for the keys of a layer and one for its values",
        "moved as bytes, scored as what they stand for; in draft mode too",
        "tests/e2e/test_fp8_cache.py::test_drafts_are_lossless",
        given=options("cache_config", cache_dtype="fp8"),
    ),
    works(
        "the same with LoRA and layer groups",
        "tokens of transformers over the same survivors, held in the same 8 bits",
        "tests/e2e/test_fp8_together.py::test_tokens_are_those_of_transformers",
        "tests/e2e/test_fp8_together.py::test_what_is_not_compressed_is_stocks",
    ),
    works(
        "the same with tensor parallelism, n-gram drafts and layer groups",
        "tokens of transformers over the same survivors, held in the same 8 bits",
        "tests/e2e/test_tensor_parallel.py::test_two_ranks_over_a_cache_of_eight_bits",
    ),
    refused(
        "Other quantised KV caches",
        "a quantised KV cache (nvfp4) that is not supported: set --kv-cache-dtype auto or fp8",
        options("cache_config", cache_dtype="nvfp4"),
    ),
    untried("Quantised weights", "attention sees none of it; no check looks at it"),
    refused(
        "KV connectors",
        "KV connectors read blocks by position: remove --kv-transfer-config",
        options(kv_transfer_config=object()),
    ),
    refused(
        "Encoder cache transfer",
        "encoder cache transfer is not supported: remove --ec-transfer-config",
        options(ec_transfer_config=object()),
    ),
    works(
        "KV events",
        "they tell what the cache holds",
        "tests/e2e/test_modes_of_use.py::test_events_tell_what_the_cache_holds",
    ),
    refused(
        "`--disable-hybrid-kv-cache-manager`",
        "layer groups need vLLM's hybrid KV cache manager: remove "
        "--disable-hybrid-kv-cache-manager",
        options("scheduler_config", disable_hybrid_kv_cache_manager=True),
    ),
    refused(
        "Sleep mode",
        "sleeping discards device memory that compression keeps queries and lengths in: "
        "remove --enable-sleep-mode",
        options("model_config", enable_sleep_mode=True),
    ),
    works(
        "Pausing generation",
        "changes no token",
        "tests/e2e/test_modes_of_use.py::test_a_pause_of_all_changes_no_token",
    ),
    works(
        "Structured output in draft mode",
        "the same as without drafts",
        "tests/e2e/test_draft.py::test_structured_output_is_that_without_drafts",
    ),
    works(
        "Streaming sessions",
        "served uncompressed, and counted so",
        "tests/e2e/test_one_request.py::test_a_session_is_served_uncompressed",
    ),
    refused(
        "A scheduler of one's own",
        "it brings its own scheduler: remove --scheduler-cls",
        options("scheduler_config", scheduler_cls="my.Scheduler"),
    ),
    refused(
        "A worker of one's own",
        "it brings its own worker: remove --worker-cls my.Worker",
        options("parallel_config", worker_cls="my.Worker"),
    ),
)

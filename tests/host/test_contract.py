"""What we rely on in vLLM 0.32: functions we wrap, methods we override, fields we read.

A new release of vLLM that changes one of these fails here, by name, before anything subtler does.
"""

import dataclasses
import importlib
import inspect

import pytest

from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.host.checks import TESTED_VLLM
from vllm_kvcompress.host.hooks import _MARK, HOOKS, Hook, install_hooks

OVERRIDES = [
    ("vllm.v1.core.sched.scheduler:Scheduler.schedule", ("self", "throttle_prefills")),
    ("vllm.v1.core.sched.scheduler:Scheduler.add_request", ("self", "request")),
    ("vllm.v1.core.sched.scheduler:Scheduler._free_request", ("self", "request")),
    ("vllm.v1.core.sched.scheduler:Scheduler._preempt_request", ("self", "request")),
    (
        "vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead",
        ("self", "request", "num_computed_tokens", "num_new_tokens"),
    ),
    (
        "vllm.v1.core.sched.scheduler:Scheduler._get_local_prefix_cache_hit",
        ("self", "request"),
    ),
    (
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    ("vllm.v1.core.sched.scheduler:Scheduler.make_stats", ("self",)),
    (
        "vllm.v1.core.kv_cache_manager:KVCacheManager.truncate_computed_blocks",
        ("self", "blocks", "num_computed_tokens"),
    ),
    (
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.get_num_blocks_to_allocate",
        ("self", "request_id", "num_tokens"),
    ),
    (
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.allocate_new_blocks",
        ("self", "request_id", "num_tokens", "num_tokens_main_model"),
    ),
    (
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.cache_blocks",
        ("self", "request", "num_tokens"),
    ),
    (
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.pop_blocks_for_free",
        ("self", "request_id"),
    ),
    # Not overridden, called: how often a host buffer may be written before kernels have read it.
    ("vllm.v1.worker.gpu.buffer_utils:set_default_max_concurrency", ("n",)),
    ("vllm.v1.worker.gpu.model_runner:GPUModelRunner.load_model", ("self",)),
    ("vllm.v1.worker.gpu.model_runner:GPUModelRunner.get_kv_cache_spec", ("self",)),
    (
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.initialize_kv_cache",
        ("self", "kv_cache_config"),
    ),
    (
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.gather_batch_req_state",
        ("self", "scheduler_output", "dummy_run"),
    ),
    ("vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_attn", ("self", "input_batch")),
    ("vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model", ("self", "scheduler_output")),
    ("vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens", ("self", "grammar_output")),
    (
        "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.propose",
        (
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
    ),
    (
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler.__init__",
        ("self", "sampler", "spec_config", "device"),
    ),
    (
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler._verify",
        (
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
    ),
    # Not overridden, called with these: the logits that vLLM's own samplers see, and its noise.
    (
        "vllm.v1.worker.gpu.sample.sampler:Sampler.apply_sampling_params",
        (
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
    ),
    (
        "vllm.v1.worker.gpu.sample.gumbel:gumbel_sample",
        (
            "logits",
            "expanded_idx_mapping",
            "temperature",
            "seed",
            "pos",
            "apply_temperature",
            "is_drafting",
        ),
    ),
    (
        "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.init_cudagraph_manager",
        ("self", "cudagraph_mode"),
    ),
    ("vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.capture", ("self",)),
    # Not overridden, called with these: CUDA graphs of draft steps.
    (
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.__init__",
        ("self", "vllm_config", "device", "cudagraph_mode", "decode_query_len"),
    ),
    (
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.capture",
        ("self", "create_forward_fn", "progress_bar_desc"),
    ),
    (
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.dispatch",
        ("self", "num_reqs", "num_tokens", "uniform_token_count", "num_active_loras"),
    ),
    ("vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.run_fullgraph", ("self", "desc")),
    ("vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.needs_capture", ("self",)),
    (
        "vllm.v1.worker.gpu.cudagraph_utils:CreateForwardFn.__call__",
        ("self", "desc", "warmup"),
    ),
    ("vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids", ("self", "draft_token_ids")),
    ("vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule", ("self", "scheduler_output")),
    ("vllm.v1.worker.gpu.model_runner:GPUModelRunner.take_draft_token_ids", ("self",)),
    ("vllm.v1.worker.gpu_worker:Worker._make_model_runner", ("self",)),
    ("vllm.v1.worker.gpu_worker:Worker._maybe_activate_jit_monitor", ("self",)),
    (
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState.add_request",
        ("self", "req_index", "new_req_data"),
    ),
    (
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState.remove_request",
        ("self", "req_id"),
    ),
    (
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState.initialize_kv_cache",
        ("self", "kv_cache_config", "block_tables"),
    ),
    (
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn",
        ("self", "input_batch", "cudagraph_mode", "block_tables", "slot_mappings", "attn_groups"),
    ),
]

FIELDS = {
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


def resolve(target: str):
    module, _, path = target.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.target)
def test_wrapped_functions_have_the_expected_signature(hook: Hook) -> None:
    hook.check_signature()
    assert hook.reason


@pytest.mark.parametrize(("target", "parameters"), OVERRIDES, ids=[o[0] for o in OVERRIDES])
def test_overridden_methods_have_the_expected_signature(target: str, parameters: tuple) -> None:
    found = tuple(inspect.signature(resolve(target)).parameters)
    assert found[: len(parameters)] == parameters


@pytest.mark.parametrize("target", FIELDS)
def test_read_fields_exist(target: str) -> None:
    names = {field.name for field in dataclasses.fields(resolve(target))}
    assert FIELDS[target] <= names


def test_what_is_read_around_attention_layers() -> None:
    """Frequencies come from the host's own method; projections are applied without all-reduce."""
    compute = "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbeddingBase"
    names = tuple(inspect.signature(resolve(f"{compute}._compute_inv_freq")).parameters)
    assert names == ("self", "base")
    method = "vllm.model_executor.layers.linear:UnquantizedLinearMethod.apply"
    assert tuple(inspect.signature(resolve(method)).parameters) == ("self", "layer", "x", "bias")
    linear = inspect.getsource(resolve("vllm.model_executor.layers.linear:RowParallelLinear"))
    for name in ("input_size_per_partition", "output_size", "params_dtype", "quant_method"):
        assert f"self.{name}" in linear or name in inspect.getsource(
            resolve("vllm.model_executor.layers.linear:LinearBase")
        )


def test_the_tokenizer_can_be_had_in_the_scheduler() -> None:
    loader = resolve("vllm.tokenizers:cached_tokenizer_from_config")
    assert next(iter(inspect.signature(loader).parameters)) == "model_config"


def test_what_is_read_of_draft_models_and_drafts() -> None:
    """Which layers are a draft model's; what is under way with asynchronous scheduling."""
    layer = resolve("vllm.model_executor.layers.attention_layer_base:AttentionLayerBase")
    assert layer.is_draft_layer is False
    speculator = "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.load_model"
    assert "is_draft_layer = True" in inspect.getsource(resolve(speculator))
    ahead = "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule"
    assert "num_output_placeholders += (" in inspect.getsource(resolve(ahead))
    config = resolve("vllm.config.speculative:SpeculativeConfig")
    names = {field.name for field in dataclasses.fields(config)}
    assert names >= {
        "method",
        "draft_model_config",
        "kv_cache_dtype",
        "draft_tensor_parallel_size",
        "enable_adaptive_verification",
    }


def test_batch_state_can_be_replaced() -> None:
    """We turn `decode_graph_eligible` off for steps whose queries are needed."""
    state = resolve("vllm.v1.worker.gpu.model_runner:BatchReqState")
    assert "decode_graph_eligible" in state._fields and hasattr(state, "_replace")


def test_draft_steps_can_be_captured() -> None:
    """Metadata is built for capture by a flag; vLLM's profiling drops a speculator's managers."""
    build = resolve("vllm.v1.worker.gpu.attn_utils:build_attn_metadata")
    asked = {"for_cudagraph_capture", "seq_lens_cpu_upper_bound", "positions", "is_prefilling"}
    assert asked | {"max_query_len", "max_seq_len", "req_idx"} <= set(
        inspect.signature(build).parameters
    )
    profile = resolve("vllm.v1.worker.gpu.cudagraph_utils:profile_cudagraph_memory")
    assert "vars(speculator)" in inspect.getsource(profile)
    runner = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
    assert "self.speculator.capture()" in inspect.getsource(resolve(f"{runner}.capture_model"))
    initialize = inspect.getsource(resolve(f"{runner}.initialize_kv_cache"))
    assert "self.speculator.init_cudagraph_manager(cudagraph_mode)" in initialize
    assert resolve("vllm.v1.worker.gpu.cudagraph_utils:AttentionState")._fields == (
        "attn_metadata",
        "slot_mappings",
    )
    for name, value in (("NULL_BLOCK_ID", 0), ("PAD_SLOT_ID", -1)):
        assert resolve(f"vllm.v1.attention.backends.utils:{name}") == value


def test_the_installed_vllm_is_a_tested_one() -> None:
    import vllm

    assert vllm.__version__.startswith(TESTED_VLLM)


def test_hooks_are_installed_once() -> None:
    install_hooks()
    first = [getattr(*hook.resolve()[:2]) for hook in HOOKS]
    install_hooks()
    second = [getattr(*hook.resolve()[:2]) for hook in HOOKS]
    for before, after in zip(first, second, strict=True):
        assert getattr(before, "__func__", before) is getattr(after, "__func__", after)
        assert getattr(after, _MARK)


def test_a_changed_host_is_refused_by_name() -> None:
    hook = Hook(HOOKS[0].target, "test", ("parser", "something_new"), lambda f: f)
    with pytest.raises(UnsupportedModelError, match=r"EngineArgs\.add_cli_args.*install vllm"):
        hook.check_signature()


def test_overrides_stay_short() -> None:
    """Nothing of the host is pasted: an override calls super() and adds a little."""
    from vllm_kvcompress.core.draft.scheduling import DraftMixin
    from vllm_kvcompress.core.scheduler import CompressionMixin
    from vllm_kvcompress.worker.draft.typical_acceptance import TypicalAcceptanceSampler
    from vllm_kvcompress.worker.model_runner import CompressionRunnerMixin
    from vllm_kvcompress.worker.model_state import CompressedModelState

    owners = (CompressionMixin, DraftMixin, CompressionRunnerMixin, CompressedModelState)
    for owner in (*owners, TypicalAcceptanceSampler):
        for name, member in vars(owner).items():
            if inspect.isfunction(member):
                lines = len(inspect.getsource(member).splitlines())
                assert lines <= 40, f"{owner.__name__}.{name} has {lines} lines"

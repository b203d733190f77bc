"""Which models are served, by their configuration and, once they are built, by their layers.

One sentence for each that is not; nothing is guessed.
"""

from typing import Any

from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.lengths.layer_kinds import FULL, WINDOWED, full_layers, layer_types

SUPPORTED_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")


def model_kind(config: Any) -> str | None:
    return unsupported_kind(config.model_config)


def unsupported_kind(model: Any) -> str | None:
    kinds = {
        "an encoder-decoder model": model.is_encoder_decoder,
        "a model with multi-head latent attention (MLA)": model.use_mla,
        "a hybrid or attention-free model": model.is_hybrid or model.is_attention_free,
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
    """Windowed layers beside full ones are left to vLLM; without full ones there is no work."""
    model = config.model_config
    types = set(layer_types(model.hf_text_config, model.max_model_len))
    if strange := types - {FULL, WINDOWED}:
        return (
            f"{model.model} has layers of the kind {sorted(strange)[0]}: choose a model whose "
            "layers attend to everything or to a window"
        )
    if FULL not in types:
        return (
            f"all layers of {model.model} are sliding-window layers of "
            f"{model.hf_text_config.sliding_window} tokens, whose cache is bounded already: choose "
            "a model with layers that attend to everything"
        )
    return None


def partial_attention(model: Any) -> str | None:
    """For a draft model, whose layers must be alike."""
    if set(layer_types(model.hf_text_config, model.max_model_len)) != {FULL}:
        return (
            f"{model.model} has sliding-window or other partial-attention layers: "
            "choose a model whose layers all attend to everything"
        )
    return None


def num_full_layers(model: Any) -> int:
    """Layers of a model configuration that can be compacted."""
    return len(full_layers(model.hf_text_config, model.max_model_len))


def has_plain_rotary(model_config: Any) -> bool:
    """Whether angles are position times frequency in the layers that attend to everything.

    By the model's configuration. Tokens of an image have several positions (M-RoPE); where a model
    is given text only, all of them are the token's own.
    """
    if _has_positions_of_images(model_config):
        return False
    return _rope(model_config).get("rope_type", "other") in ("default", "llama3")


def rotary_sentence(model_config: Any) -> str:
    """What a model without a plain rotary embedding does instead."""
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
    elif getattr(impl, "logits_soft_cap", None):
        reason = "caps its logits, which scoring does not know: choose a model without a soft cap"
    elif getattr(impl, "sinks", None) is not None:
        reason = "has learned attention sinks, which scoring does not know: choose another model"
    elif backend not in SUPPORTED_BACKENDS:
        allowed = ", ".join(SUPPORTED_BACKENDS)
        reason = f"uses the attention backend {backend}: set --attention-backend to {allowed}"
    if reason is not None:
        raise UnsupportedModelError(
            f"--kv-compression: layer {name} {reason}, or drop --kv-compression."
        )

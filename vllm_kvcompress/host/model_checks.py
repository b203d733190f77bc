"""Which models are served, by their configuration and, once they are built, by their layers.

One sentence for each that is not; nothing is guessed.
"""

from typing import Any

from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.lengths.layer_kinds import FULL, WINDOWED, full_layers, layer_types

SUPPORTED_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")


def model_kind(config: Any) -> str | None:
    return unsupported_kind(config.model_config)


def draft_model_kind(model: Any) -> str | None:
    """A draft model is shown token ids only, and its cache is laid out as one of text is."""
    if model.is_multimodal_model:
        return f"{model.model} is a multimodal model: choose a decoder-only text model"
    return unsupported_kind(model)


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
    rope = getattr(model_config.hf_text_config, "rope_parameters", None) or {}
    rope = rope.get(FULL, rope)  # where kinds of layers have embeddings of their own
    has_several = rope.get("mrope_section") or getattr(model_config, "uses_mrope", False)
    if has_several and getattr(model_config, "supports_multimodal_inputs", True):
        return False
    return rope.get("rope_type", "other") in ("default", "llama3")


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

"""Whether the layers of a model have the parts that policies ask for, before weights are loaded."""

from collections.abc import Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.config.reading import preset, preset_names
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.host.model_checks import has_plain_rotary
from vllm_kvcompress.lengths.layer_kinds import full_layers

if TYPE_CHECKING:
    from vllm_kvcompress.host.attention_probe import ProbedLayer


class Turning(IntEnum):
    """What is known of rotary embeddings in the layers that attend to everything."""

    UNKNOWN = 0
    """Of one of them at least: nothing, or that angles are not position times frequency."""
    PARTLY = 1
    """Some have none (NoPE); all others turn by position times frequency."""
    ALIKE = 2
    """All turn by position times frequency, or none does (the full layers of EXAONE 4)."""


def keys_turn(model_config: Any) -> Turning:
    """What is known before weights are loaded, by configuration and transformers' classes.

    Of a model class of vLLM's own, what the probe does not know is what the configuration says:
    once it is built, its modules are looked at. Without vLLM, transformers' classes are what runs.
    """
    if not has_plain_rotary(model_config):
        return Turning.UNKNOWN
    layers = _probed_full_layers(model_config)
    theirs = not hasattr(model_config, "using_transformers_backend")
    theirs = theirs or on_transformers_backend(model_config)
    if theirs and any(each.rotary is None for each in layers):
        return Turning.UNKNOWN
    turning = {each.turns for each in layers if each.rotary is not None}
    return Turning.PARTLY if len(turning) > 1 else Turning.ALIKE


def has_output_projections(model_config: Any) -> bool:
    """Whether a linear layer is known behind each layer that attends to everything.

    vLLM's own model classes have one; of others the probe says it.
    """
    return not on_transformers_backend(model_config) or all(
        each.output_projection for each in _probed_full_layers(model_config)
    )


def on_transformers_backend(model_config: Any) -> bool:
    """Whether vLLM runs the model with transformers' modules around its own attention."""
    asked = getattr(model_config, "using_transformers_backend", None)
    return asked is not None and asked()


def probed_layers(model_config: Any) -> Mapping[int, "ProbedLayer"]:
    """Attention layers by number; remote code only where it is what vLLM runs."""
    from vllm_kvcompress.host.attention_probe import probe  # needs torch; `kvcompress` may not

    trusts = on_transformers_backend(model_config) and model_config.trust_remote_code
    return probe(model_config.hf_text_config, trusts)


def _probed_full_layers(model_config: Any) -> list["ProbedLayer"]:
    from vllm_kvcompress.host.attention_probe import ProbedLayer

    layers = probed_layers(model_config)
    max_len = getattr(model_config, "max_model_len", None)
    numbers = full_layers(model_config.hf_text_config, max_len)
    return [layers.get(number, ProbedLayer()) for number in numbers]


def check_parts(setting: CompressionConfig, model_config: Any) -> None:
    """Refuse a setting whose policy needs a part that the layers are not known to have.

    Angles that are scaled by length are refused before.

    Raises
    ------
    ConfigError
        Naming the presets that fit the model.
    """
    if lacking := _lacking_part(setting, model_config):
        raise ConfigError(
            f"policy.name: {setting.policy.name} {lacking}; choose one of the presets "
            f"{', '.join(_fitting_presets(model_config))}."
        )


def _lacking_part(setting: CompressionConfig, model: Any) -> str | None:
    policy, is_coded = setting.build_policy(), setting.codebook is not None
    if policy.needs_output_projection and not has_output_projections(model):
        return (
            "needs the output projection of every layer, and which module that is in "
            f"{model.model} on vLLM's Transformers backend is not known"
        )
    if not (policy.needs_rotary or policy.rerotates_keys or is_coded):
        return None
    turning = keys_turn(model)
    if turning is Turning.UNKNOWN and on_transformers_backend(model):
        return (
            "turns keys or queries by whole positions, and how layers turn them in "
            f"{model.model} on vLLM's Transformers backend is not known"
        )
    if turning is Turning.PARTLY and (policy.rerotates_keys or is_coded):
        return (
            "turns keys by whole positions, alike in all layers, and some layers of "
            f"{model.model} have no rotary embedding"
        )
    return None


def _fitting_presets(model: Any) -> list[str]:
    """Presets whose policies find what they need in every layer."""
    fitting = []
    for name in preset_names():
        setting = preset(name)
        if not any(_lacking_part(each, model) for each in (setting, *setting.by_task.values())):
            fitting.append(name)
    return fitting

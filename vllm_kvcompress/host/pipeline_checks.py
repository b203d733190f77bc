"""What pipeline stages ask of a model and of a setting.

A stage has its own layers, their caches and their queries, and carries out every plan for them: the
scheduler's plans reach all stages. So whatever a layer decides by itself works as on one worker.
What one layer decides for another works within a stage only.
"""

from typing import Any

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.host.part_checks import on_transformers_backend
from vllm_kvcompress.lengths.budgets import layer_groups, score_leaders
from vllm_kvcompress.lengths.codebook import coded_groups
from vllm_kvcompress.lengths.layer_kinds import full_layers


def stages(vllm_config: Any) -> list[int]:
    """Pipeline stage of every layer that is compacted, from 0; one number where there is one."""
    from vllm.distributed.utils import get_pp_indices

    model, count = vllm_config.model_config, vllm_config.parallel_config.pipeline_parallel_size
    text = model.hf_text_config
    ends = [get_pp_indices(text.num_hidden_layers, stage, count)[1] for stage in range(count)]
    full = full_layers(text, model.max_model_len)
    return [sum(number >= end for end in ends) for number in full]


def pipeline(config: Any) -> str | None:
    """Why a model cannot be served on so many stages, if it cannot."""
    size, model = config.parallel_config.pipeline_parallel_size, config.model_config
    if size == 1:
        return None
    kinds = {
        "multi-head latent attention (MLA)": model.use_mla,
        "recurrent layers": model.is_hybrid,
        "images": model.supports_multimodal_inputs,
        "vLLM's Transformers backend": on_transformers_backend(model),
    }
    for kind, applies in kinds.items():
        if applies:
            return f"--pipeline-parallel-size {size} with {kind} has not been tried: set it to 1"
    if set(stages(config)) == set(range(size)):
        return None
    return (
        f"--pipeline-parallel-size {size} leaves a stage without layers that attend to everything: "
        "lower it, or set VLLM_PP_LAYER_PARTITION"
    )


def check_pipeline_setting(setting: CompressionConfig, vllm_config: Any) -> None:
    """Refuse a setting, of the server or of one request, that pipeline stages cannot carry out.

    Raises
    ------
    ConfigError
        With the first reason found.
    """
    if vllm_config.parallel_config.pipeline_parallel_size == 1:
        return
    if setting.drafts:
        raise ConfigError(
            "mode: drafts run all layers of the model, and a pipeline stage has some of them; "
            "leave out draft mode and draft.budget, or --pipeline-parallel-size."
        )
    if vllm_config.speculative_config is not None:
        raise ConfigError(
            "--speculative-config: drafts beside pipeline stages have not been tried over a "
            "compressed cache; remove it, or --pipeline-parallel-size."
        )
    stage_of = stages(vllm_config)
    for variant in (setting, *setting.by_task.values()):
        groups = layer_groups(len(stage_of), variant.layer_groups)
        if coded_groups(variant.codebook, max(groups) + 1):
            raise ConfigError(
                "codebook: what pipeline stages but the last code is counted by nobody; leave "
                "codebook out, or --pipeline-parallel-size."
            )
        policy = variant.build_policy()
        if policy.shares_scores:
            _check_leaders(score_leaders(groups, policy.layers_per_ranking), stage_of)


def _check_leaders(leaders: list[int], stage_of: list[int]) -> None:
    for layer, leader in enumerate(leaders):
        if stage_of[layer] != stage_of[leader]:
            raise ConfigError(
                f"policy: layer {leader} ranks for layer {layer}, which is on another pipeline "
                "stage; let fewer layers share a ranking (windowkv: policy.layers_per_leader 1), "
                "or leave out --pipeline-parallel-size."
            )

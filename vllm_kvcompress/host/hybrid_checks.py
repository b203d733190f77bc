"""Which models with recurrent layers beside attention are served, and in which modes of vLLM's.

Their states (Mamba, linear attention, short convolutions) are vLLM's business. Of an architecture
we must know which layers attend to everything, and what else lies in its cache: what has not been
tried is refused.
"""

from typing import Any

from vllm_kvcompress.lengths.layer_kinds import TRIED_HYBRIDS


def hybrid_model(config: Any) -> str | None:
    """Why a model with recurrent layers is not served; None for one that is, and for others."""
    model, cache = config.model_config, config.cache_config
    if not model.is_hybrid:
        return None
    if model.architecture not in TRIED_HYBRIDS:
        return (
            f"{model.model} is a hybrid model ({model.architecture}) that has not been tried: "
            f"choose one of {', '.join(TRIED_HYBRIDS)}, or a model whose layers all attend"
        )
    if config.speculative_config is not None:
        return (
            f"{model.model} has recurrent layers, beside which speculative decoding over a "
            "compressed cache is not supported: remove --speculative-config"
        )
    if cache.use_replayssm:
        return "recurrent states that are replayed have not been tried: remove --use-replayssm"
    if cache.prefix_match_unit is not None:
        return (
            "prefix-cache hits that end within a block are not supported: remove "
            "--prefix-match-unit"
        )
    return None

"""What the line at start-up says of drafting."""

from vllm_kvcompress.config.settings import CompressionConfig


def _acceptance(config: CompressionConfig) -> str:
    thresholds = config.draft.typical_thresholds
    if thresholds is None:
        return ""
    epsilon, delta = thresholds
    return (
        f"; LOSSY: typical acceptance (epsilon {epsilon:g}, delta {delta:g}) does not keep the "
        "distribution of requests with a temperature"
    )


def views_alone(config: CompressionConfig) -> str | None:
    """The end of the line where views are all there is; None where tokens are evicted."""
    if config.mode != "draft":
        return None
    return (
        f", mode draft: nothing is evicted; prompts from {config.min_prompt_len} tokens "
        f"get a view of that budget, {config.num_draft_tokens} tokens are drafted over it per "
        f"step and verified over the whole cache{_acceptance(config)}"
    )


def views_beside(config: CompressionConfig) -> str:
    """The end of the line where tokens are evicted; empty where nothing is drafted."""
    if not config.drafts:
        return ""
    drafted = f", {config.num_draft_tokens} tokens drafted per step over a smaller view"
    return drafted + _acceptance(config)

"""The line at start-up that says what compression will do."""

from vllm.utils.mem_utils import format_gib
from vllm.v1.kv_cache_interface import KVCacheConfig, iter_layer_specs

from vllm_kvcompress.budgets import budget_tokens, compaction_lengths
from vllm_kvcompress.config import CompressionConfig


def _format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes < 2**30 else f"{format_gib(num_bytes)} GiB"


def savings_line(config: CompressionConfig, kv_cache: KVCacheConfig, max_model_len: int) -> str:
    """Policy, budget, groups, and what that saves per request of `max_model_len` tokens."""
    groups = kv_cache.kv_cache_groups
    block_size = groups[0].kv_cache_spec.block_size
    layer_groups = [group.kv_cache_spec.layer_group for group in groups]
    lengths = compaction_lengths(max_model_len, config, max(layer_groups) + 1, block_size)
    full = saved = full_bytes = saved_bytes = 0
    for group, number in zip(groups, layer_groups, strict=True):
        spec = next(iter(iter_layer_specs(group.kv_cache_spec)))
        page = spec.page_size_bytes * len(group.layer_names)
        num_blocks = -(-max_model_len // block_size)
        plan = lengths[number]
        num_saved = plan.evicted // block_size if plan else 0
        full, saved = full + num_blocks, saved + num_saved
        full_bytes, saved_bytes = full_bytes + num_blocks * page, saved_bytes + num_saved * page
    budget = (
        f"{config.budget.ratio:.0%} of the prompt"
        if config.budget.ratio is not None
        else f"{config.budget.tokens} tokens"
    )
    what = (
        f"KV compression: policy {config.policy.name}, budget {budget} "
        f"({budget_tokens(max_model_len, config)} of {max_model_len} tokens, "
        f"{config.layer_budget.shape} over layers), {max(layer_groups) + 1} layer group(s) in "
        f"{len(groups)} block table(s), block size {block_size}"
    )
    if config.tasks:
        what += f", task {config.task}"
    if config.mode == "draft":
        return (
            f"{what}, mode draft: nothing is evicted; prompts from {config.min_prompt_len} tokens "
            f"get a view of that budget, {config.num_draft_tokens} tokens are drafted over it per "
            "step and verified over the whole cache"
        )
    if config.compresses_prompts:
        what += (
            f", prompts from {config.min_prompt_len} tokens: a request of max_model_len keeps "
            f"{full - saved} of {full} blocks ({_format_bytes(full_bytes - saved_bytes)} of "
            f"{_format_bytes(full_bytes)} per worker) once its prompt is done"
        )
    if config.compresses_while_decoding:
        what += f", back to its budget every {config.interval} generated tokens"
    if config.drafts:
        what += f", {config.num_draft_tokens} tokens drafted per step over a smaller view"
    return what

"""The line at start-up that says what compression will do."""

from vllm.utils.mem_utils import format_gib
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheConfig,
    MambaSpec,
    SlidingWindowSpec,
    iter_layer_specs,
)

from vllm_kvcompress.config.reading import CompressionConfig
from vllm_kvcompress.core.draft.report import views_alone, views_beside
from vllm_kvcompress.core.host_groups import blocks_per_state
from vllm_kvcompress.lengths.budgets import budget_tokens, compaction_lengths
from vllm_kvcompress.lengths.codebook import coded_groups
from vllm_kvcompress.lengths.longest_peak import longest_prompt_peak
from vllm_kvcompress.lengths.schedule import first_kept
from vllm_kvcompress.spec import GroupMap


def _format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes < 2**30 else f"{format_gib(num_bytes)} GiB"


def savings_line(config: CompressionConfig, kv_cache: KVCacheConfig, max_model_len: int) -> str:
    """Policy, budget, groups, and what that saves per request of `max_model_len` tokens."""
    groups = kv_cache.kv_cache_groups
    group_map = GroupMap.of(group.kv_cache_spec for group in groups)
    block_size, num_layer_groups = group_map.block_size, group_map.num_layer_groups
    lengths = compaction_lengths(
        max_model_len, config, num_layer_groups, block_size, group_map.codes_per_row
    )
    peaks = longest_prompt_peak(max_model_len, config, num_layer_groups, block_size)
    full = saved = full_bytes = saved_bytes = num_windowed = num_recurrent = on_its_way = 0
    # A block lies on every pipeline stage, and is as large as the largest group's there.
    most_layers = max(len(group.layer_names) for group in groups)
    specs = [next(iter(iter_layer_specs(group.kv_cache_spec))) for group in groups]
    for group, spec, number in zip(groups, specs, group_map.layer_groups, strict=True):
        page = spec.page_size_bytes * (len(group.layer_names) or most_layers)
        num_held = max_model_len
        if isinstance(spec, SlidingWindowSpec):
            num_windowed += 1
            num_held = min(max_model_len, spec.sliding_window + spec.block_size)
        num_blocks = -(-num_held // spec.block_size)
        if isinstance(spec, MambaSpec):
            num_recurrent += 1
            num_blocks = blocks_per_state(spec)
        plan = None if number is None else lengths[number]
        num_saved = plan.evicted // block_size if plan else 0
        on_its_way += num_blocks if number is None else -(-peaks[number] // block_size)
        full, saved = full + num_blocks, saved + num_saved
        full_bytes, saved_bytes = full_bytes + num_blocks * page, saved_bytes + num_saved * page
    num_tables = len(groups) - group_map.layer_groups.count(None)
    num_whole = len(groups) - num_tables - num_windowed - num_recurrent
    budget = (
        f"{config.budget.ratio:.0%} of the prompt"
        if config.budget.ratio is not None
        else f"{config.budget.tokens} tokens"
    )
    what = (
        f"KV compression: policy {config.policy.name}, budget {budget} "
        f"({budget_tokens(max_model_len, config)} of {max_model_len} tokens, "
        f"{config.layer_budget.shape} over layers), {num_layer_groups} layer group(s) in "
        f"{num_tables} block table(s), block size {block_size}"
    )
    # States of recurrent layers have types of their own.
    cached = [spec for spec in specs if isinstance(spec, AttentionSpec)]
    has_eight_bits = all(spec.dtype.itemsize == 1 for spec in cached)
    if has_eight_bits:
        what += ", cache of 8 bits"
    if num_idle := sum(not group.layer_names for group in groups):
        what += f", blocks of {num_idle} of them idle on the first pipeline stage"
    if num_windowed:
        what += f", windowed layers left to vLLM in {num_windowed} more"
    if num_recurrent:
        what += f", recurrent states left to vLLM in {num_recurrent} more"
    if num_whole:
        what += f", the draft model's cache kept whole in {num_whole} more"
    coded = coded_groups(config.codebook, num_layer_groups)
    if coded:
        what += f", layer group(s) {', '.join(map(str, coded))} coded by a codebook"
        if config.extends_codebooks:
            what += f", generated tokens too every {config.interval}"
    if config.tasks:
        what += f", task {config.task}"
    if (ending := views_alone(config)) is not None:
        return what + ending
    if config.waits_for_pressure:
        what += (
            ", while memory is scarce only (from "
            f"{config.pressure.when:.0%} of the blocks held to {config.pressure.until:.0%}, "
            "or a request gets none)"
        )
    if config.compresses_prompts:
        what += (
            f", prompts from {config.min_prompt_len} tokens: a request of max_model_len keeps "
            f"{full - saved} of {full} blocks ({_format_bytes(full_bytes - saved_bytes)} of "
            f"{_format_bytes(full_bytes)} per worker) once its prompt is done"
        )
        if has_eight_bits:
            share = (full_bytes - saved_bytes) / (2 * full_bytes)
            what += f", {share:.0%} of the bytes of a whole cache of 16 bits"
    if config.compresses_in_prompts:
        what += (
            f", back to its budget every {config.prompt_interval} tokens of the prompt, counted "
            f"back from its end: no prompt holds more than {on_its_way} blocks on its way, of the "
            f"pool's {kv_cache.num_blocks - 1}"
        )
    if config.shared_blocks == "always":
        # A compaction while decoding alone is due behind the first interval.
        prompt_len = max_model_len - (0 if config.compresses_prompts else config.interval)
        sizes = num_layer_groups, block_size, group_map.codes_per_row
        kept = first_kept(max(prompt_len, 1), max_model_len, config, *sizes)
        aside = sum(
            kept[number] // block_size for number in group_map.layer_groups if number is not None
        )
        what += (
            f", requests that share blocks at their marks as well: for each but one up to {aside} "
            "blocks are set aside until then"
        )
    if config.waits_for_pressure:
        what += ", or when it is chosen while decoding"
    if config.compacts_at_intervals:
        what += f", back to its budget every {config.interval} generated tokens"
    return what + views_beside(config)

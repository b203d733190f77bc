"""The check of `kvcompress doctor` that works out what a setting saves."""

from collections.abc import Iterator

from vllm_kvcompress.doctor.findings import Finding, Question
from vllm_kvcompress.lengths.geometry import read_geometry
from vllm_kvcompress.lengths.sizing import (
    RequestUsage,
    capacity,
    format_size,
    request_usage,
)


def find_savings(question: Question) -> Iterator[Finding]:
    """Blocks of the longest prompt, and how many such prompts fit; nothing without a setting."""
    config, model, made = question.config, question.model, question.vllm_config
    if config is None or model is None:
        return
    if config.mode == "draft":
        yield Finding("ok", "saving", "the mode draft evicts nothing and saves no memory.")
        return
    geometry, block_size = read_geometry(model, latent=True), 16
    length = geometry.max_positions
    if made is not None:
        dtype = str(made.model_config.dtype).removeprefix("torch.")
        geometry = read_geometry(model, dtype, latent=True)
        block_size, length = made.cache_config.block_size, made.model_config.max_model_len
    if not length:
        return
    variants = config.by_task.values() if config.tasks else [config]
    usages = [request_usage(geometry, each, length, 0, block_size) for each in variants]
    usage = max(usages, key=lambda each: each.blocks_after)
    yield _saved(usage, length, block_size)
    if question.cache_memory:
        yield from _fitting(usage, length, question.cache_memory)


def _saved(usage: RequestUsage, length: int, block_size: int) -> Finding:
    if usage.compacted_at is None or usage.blocks_after >= usage.blocks_before:
        return Finding(
            "warning",
            "saving",
            f"a prompt of {length:,} tokens is not compressed when it ends: lower min_prompt_len "
            "or the budget, or set the trigger end_of_prompt.",
        )
    whole = format_size(usage.stock_blocks_prompt * usage.stock_block_bytes)
    return Finding(
        "ok",
        "saving",
        f"a prompt of {length:,} tokens keeps {usage.blocks_after:,} of {usage.blocks_before:,} "
        f"blocks of {block_size} tokens, {usage.size(usage.blocks_after)} instead of {whole} per "
        "worker.",
    )


def _fitting(usage: RequestUsage, length: int, memory: int) -> Iterator[Finding]:
    fit, size = capacity(usage, memory), format_size(memory)
    if fit.one_by_one == 0:
        yield Finding(
            "warning",
            "memory",
            f"{size} is too small for a prompt of {length:,} tokens, which takes "
            f"{usage.size(usage.blocks_needed + 1)}: give more, or set --max-model-len.",
        )
        return
    yield Finding(
        "ok",
        "memory",
        f"{size} hold {fit.one_by_one:,} such prompts once compressed, and {fit.stock_decoding:,} "
        "without compression.",
    )

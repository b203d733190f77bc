"""Refuses prompts that the pool cannot hold, where the server starts with less than a longest one.

With compression inside prompts vLLM starts with a pool for the longest prompt under the server's
setting. A request that asks for less compression may not fit: it would wait for ever.
"""

from collections.abc import Iterator
from typing import Any

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.host.model_checks import num_full_layers
from vllm_kvcompress.lengths.budgets import layer_groups
from vllm_kvcompress.lengths.longest_peak import longest_prompt_peak
from vllm_kvcompress.lengths.peak import peak_tokens
from vllm_kvcompress.lengths.sizing import block_tables
from vllm_kvcompress.plans import RequestOptions
from vllm_kvcompress.request_options import TASKS, named_config, resolve_request


def check_pool(
    vllm_config: Any,
    server: CompressionConfig,
    options: RequestOptions,
    prompt_len: int,
    is_session: bool,
) -> None:
    """Refuse a request whose prompt the pool cannot hold.

    Raises
    ------
    ConfigError
        With what it needs, what there is, and how long a prompt may be.
    """
    num_usable = _usable_blocks(vllm_config)
    if num_usable is None or not _may_be_short(server):
        return
    never: list[CompressionConfig | None] = [None]
    settings = never if is_session else list(_possible(server, options))
    group_tables = _tables(vllm_config.model_config, server)
    block_size = vllm_config.cache_config.block_size
    ahead = getattr(vllm_config.speculative_config, "num_speculative_tokens", None) or 0
    longest_len = vllm_config.model_config.max_model_len

    shared_len = options.shared_len(block_size)

    def lengths(length: int) -> tuple[int, int]:
        """Tokens that are compressed of a prompt, and tokens that there will be at least."""
        whole = length if shared_len is None else min(shared_len, length)
        return whole, min(length + 1 + ahead, longest_len)

    def num_blocks(length: int) -> int:
        """Of the setting that needs least: which task it is, the engine decides."""
        return min(_blocks(*lengths(length), each, group_tables, block_size) for each in settings)

    needed = num_blocks(prompt_len)
    if needed <= num_usable:
        return

    def fits(length: int) -> bool:
        """Whether every prompt of up to so many tokens does: a shorter one may need more."""
        whole, end = lengths(length)
        return any(
            _blocks(whole, end, each, group_tables, block_size) <= num_usable
            and _most_blocks(whole, each, group_tables, block_size) <= num_usable
            for each in settings
        )

    low, high = 0, prompt_len
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    why = "is a streaming session, which is never compressed" if is_session else "keeps too much"
    raise ConfigError(
        f"prompt: it has {prompt_len} tokens and needs {needed} KV cache blocks of {block_size} "
        f"tokens under its setting, and this server has {num_usable}; it {why}. Prompts of up to "
        f"{low} tokens fit so: send a shorter one, or leave it to the setting of the server."
    )


def _usable_blocks(vllm_config: Any) -> int | None:
    """Blocks that one engine hands out; None where this process was not told."""
    total = vllm_config.cache_config.num_gpu_blocks
    # The sum over data-parallel engines; each of them keeps one block back.
    return total // vllm_config.parallel_config.data_parallel_size - 1 if total else None


def _may_be_short(server: CompressionConfig) -> bool:
    """Whether vLLM may have started with less than its longest sequence takes."""
    variants = server.by_task.values() if server.tasks else (server,)
    return all(each.compresses_in_prompts for each in variants)


def _possible(
    server: CompressionConfig, options: RequestOptions
) -> Iterator[CompressionConfig | None]:
    named = named_config(server, options)
    for task in TASKS if named is not None and named.tasks else (None,):
        yield resolve_request(server, options, task)


def _tables(model: Any, server: CompressionConfig) -> list[int]:
    """Block tables of each layer group; at least so many where other layers are beside them."""
    num_full = num_full_layers(model)
    groups = layer_groups(num_full, server.layer_groups)
    if num_full < model.hf_text_config.num_hidden_layers:
        return [1] * (max(groups) + 1)
    return block_tables(groups)[0]


def _blocks(
    compressed_len: int,
    num_tokens: int,
    setting: CompressionConfig | None,
    group_tables: list[int],
    block_size: int,
) -> int:
    peaks = [num_tokens] * len(group_tables)
    if setting is not None:
        peaks = peak_tokens(compressed_len, num_tokens, setting, len(group_tables), block_size, 1)
    return _sum(peaks, group_tables, block_size)


def _most_blocks(
    max_len: int, setting: CompressionConfig | None, group_tables: list[int], block_size: int
) -> int:
    """Blocks that any prompt of up to `max_len` tokens needs until it is computed."""
    peaks = [max_len] * len(group_tables)
    if setting is not None:
        peaks = longest_prompt_peak(max_len, setting, len(group_tables), block_size)
    return _sum(peaks, group_tables, block_size)


def _sum(peaks: list[int], group_tables: list[int], block_size: int) -> int:
    return sum(n * -(-peak // block_size) for n, peak in zip(group_tables, peaks, strict=True))

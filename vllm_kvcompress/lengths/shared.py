"""How many requests about one text a pool holds: the text once, and what follows it for each."""

from dataclasses import dataclass

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.lengths.geometry import ModelGeometry
from vllm_kvcompress.lengths.sizing import request_usage


@dataclass(frozen=True)
class SharedCapacity:
    """Blocks of a pool that hold a text, and requests that begin with it.

    Attributes
    ----------
    tokens : int
        Of the text, in whole blocks.
    blocks_before, blocks_after : int
        What it takes whole, and compressed.
    stock, compressed : int
        Requests that hold all their output tokens beside the text, without and with compression.
    """

    tokens: int
    blocks_before: int
    blocks_after: int
    stock: int
    compressed: int


def setting_of_prefix(config: CompressionConfig) -> CompressionConfig:
    """A setting for a text that others begin with: nothing is compressed behind its end."""
    trigger = "prompt" if config.compresses_in_prompts else "end_of_prompt"
    return config.model_copy(update={"trigger": trigger})


def shared_capacity(
    geometry: ModelGeometry,
    config: CompressionConfig,
    memory: int,
    shared_len: int,
    request_len: int,
    block_size: int = 16,
    tensor_parallel_size: int = 1,
) -> SharedCapacity:
    """Fill a pool of `memory` bytes per worker; vLLM keeps one block back.

    What follows the text stays whole.

    Parameters
    ----------
    memory : int
        Bytes.
    shared_len, request_len : int
        Tokens that all prompts begin with, and tokens of one request, its output included.
    """
    whole = shared_len // block_size * block_size
    # One token at least follows the text: the answer's first.
    rest = max(request_len - whole, 1)
    text, own = (
        request_usage(
            geometry,
            setting,
            length,
            block_size=block_size,
            tensor_parallel_size=tensor_parallel_size,
        )
        for setting, length in ((setting_of_prefix(config), whole), (config, rest))
    )
    stock = memory // text.stock_block_bytes - 1 - text.stock_blocks_prompt
    pool = memory // text.block_bytes - 1 - text.blocks_after
    return SharedCapacity(
        tokens=whole,
        blocks_before=text.blocks_before,
        blocks_after=text.blocks_after,
        stock=max(stock // own.stock_blocks_prompt, 0),
        compressed=max(pool // own.blocks_before, 0),
    )

"""A text held once, and requests behind it: blocks by hand."""

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.lengths.geometry import ModelGeometry
from vllm_kvcompress.lengths.shared import SharedCapacity, shared_capacity

GEOMETRY = ModelGeometry(4, 2, 64, "bfloat16", 8192)
BLOCK_BYTES = 16 * 4 * 2 * 2 * 64 * 2
"""16 tokens, 4 layers, keys and values of 2 heads with 64 numbers of 2 bytes."""


@pytest.mark.parametrize(
    ("pool", "stock", "compressed"),
    [
        (100, 0, 5),  # 99 blocks; 100 hold the text, or 25 and 5 times 14
        (131, 2, 7),  # 130 - 100 = 30; 130 - 25 = 105
        (10, 0, 0),
    ],
)
def test_a_text_of_1600_tokens_and_requests_of_14_blocks(
    pool: int, stock: int, compressed: int
) -> None:
    config = parse_config({"preset": "shared_prefix", "trigger": "both", "interval": 32})
    assert config is not None
    # 1,610 tokens are 100 whole blocks and 10 tokens; of 1,600 a quarter is 25 blocks.
    found = shared_capacity(GEOMETRY, config, pool * BLOCK_BYTES, 1610, 1610 + 205)
    assert found == SharedCapacity(1600, 100, 25, stock, compressed)


def test_a_text_that_is_too_short_stays_whole() -> None:
    config = parse_config("shared_prefix")
    assert config is not None
    found = shared_capacity(GEOMETRY, config, 101 * BLOCK_BYTES, 160, 320)
    assert found == SharedCapacity(160, 10, 10, 9, 9)


def test_requests_may_be_the_text_alone() -> None:
    """Each has one block at least, for the answer's first token."""
    config = parse_config("shared_prefix")
    assert config is not None
    found = shared_capacity(GEOMETRY, config, 131 * BLOCK_BYTES, 1600, 1600)
    assert found == SharedCapacity(1600, 100, 25, 30, 105)


def test_layer_groups_share_the_pool() -> None:
    config = parse_config({"preset": "shared_prefix", "layer_groups": {"count": 2}})
    assert config is not None
    # A block holds half as many layers, so each token is in two tables.
    found = shared_capacity(GEOMETRY, config, 131 * BLOCK_BYTES, 1600, 1600 + 224)
    assert (found.blocks_before, found.blocks_after) == (200, 50)
    assert found.compressed == (2 * 131 - 1 - 50) // 28 and found.stock == (130 - 100) // 14

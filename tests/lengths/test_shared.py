"""A text held once, and requests behind it: blocks by hand."""

from dataclasses import astuple

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.lengths.geometry import ModelGeometry
from vllm_kvcompress.lengths.shared import SharedCapacity, setting_of_prefix, shared_capacity

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
    assert all(isinstance(each, int) for each in astuple(found))


def test_blocks_of_another_size_over_two_workers() -> None:
    """1,610 tokens are 50 blocks and 10 tokens, a quarter of them 13 blocks; 215 tokens are 7."""
    config = parse_config("shared_prefix")
    assert config is not None
    found = shared_capacity(GEOMETRY, config, 64 * BLOCK_BYTES, 1610, 1610 + 205, 32, 2)
    assert found == SharedCapacity(1600, 50, 13, (64 - 1 - 50) // 7, (64 - 1 - 13) // 7)


@pytest.mark.parametrize(
    ("trigger", "expected"),
    [
        ("end_of_prompt", "end_of_prompt"),
        ("interval", "end_of_prompt"),
        ("both", "end_of_prompt"),
        ("prompt", "prompt"),
        ("all", "prompt"),
    ],
)
def test_nothing_is_compressed_behind_the_text(trigger: str, expected: str) -> None:
    config = parse_config({"preset": "shared_prefix", "trigger": trigger})
    assert config is not None
    found = setting_of_prefix(config)
    assert found.trigger == expected
    assert found.model_copy(update={"trigger": trigger}) == config


def test_a_text_below_one_block_takes_none() -> None:
    """It was counted as a compressed block, and a request too few was said to fit."""
    config = parse_config("shared_prefix")
    assert config is not None
    found = shared_capacity(GEOMETRY, config, 101 * BLOCK_BYTES, 15, 320)
    assert found == SharedCapacity(0, 0, 0, 5, 5)


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

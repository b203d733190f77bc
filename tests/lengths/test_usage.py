"""What `kvcompress plan` shows of a request and of a pool: every number, by hand."""

from dataclasses import astuple
from typing import Any

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.lengths.geometry import ModelGeometry
from vllm_kvcompress.lengths.sizing import (
    Capacity,
    GroupUsage,
    RequestUsage,
    capacity,
    format_size,
    longest_prompts,
    parse_size,
    request_usage,
)

MODEL = ModelGeometry(num_layers=5, num_kv_heads=8, head_dim=128, dtype="bfloat16")
LAYER = 16 * 2 * 8 * 128 * 2
"""Bytes of a block of 16 tokens in one layer."""


def setting(**fields: Any) -> Any:
    return parse_config({"preset": "streaming_llm", **fields})


def test_all_of_a_request_in_unequal_groups() -> None:
    """3 and 2 layers, in blocks of 2; 12 % of 32,007 is 3,840, and the last 7 tokens stay."""
    usage = request_usage(MODEL, setting(layer_groups={"size": 3}), 32_007)
    first = GroupUsage(0, 0, 3, 2, 32_007, 3847, 3847, 2 * 2001, 2 * 241)
    assert usage == RequestUsage(
        groups=(first, GroupUsage(1, 3, 2, 1, 32_007, 3847, 3847, 2001, 241)),
        compacted_at=32_007,
        block_bytes=2 * LAYER,
        padding=pytest.approx(1 / 6),
        blocks_before=3 * 2001,
        blocks_after=3 * 241,
        blocks_peak=3 * (2001 + 240),
        blocks_needed=3 * 2001,
        blocks_prompt=3 * 2001,
        blocks_decoding=3 * 241,
        blocks_reserved=3 * 240,
        stock_block_bytes=5 * LAYER,
        stock_blocks_prompt=2001,
        stock_blocks_decoding=2001,
    )
    assert usage.size(1000) == format_size(1000 * 2 * LAYER) == "125.0 MiB"


def test_a_prompt_is_all_where_no_output_is_said() -> None:
    usage = request_usage(MODEL, setting(), 32_000)
    assert usage.stock_blocks_decoding == usage.stock_blocks_prompt == 2000


def test_coded_tokens_are_attended_and_take_fewer_slots() -> None:
    """1,000 tokens are 62 blocks and 8 tokens; half are kept, 492 of them coded.

    A quarter of 492 is 123 entries in 8 blocks; a slot of 128 numbers in 16 bits takes 16 tokens'
    codes, whose 31 slots are 2 blocks.
    """
    config = parse_config(
        {
            "preset": "keydiff",
            "budget": {"ratio": 0.5, "floor": 1},
            "codebook": {"shallow": 0.5, "entries": 0.25},
            "layer_groups": {"count": 2},
            "min_prompt_len": 0,
        }
    )
    assert config is not None
    coded, kept = request_usage(ModelGeometry(2, 2, 64, "float16"), config, 1000).groups
    assert (coded.tokens_after, coded.tokens_attended) == (10 * 16 + 8, 492 + 8)
    assert (kept.tokens_after, kept.tokens_attended) == (31 * 16 + 8, 31 * 16 + 8)


@pytest.mark.parametrize(
    ("num_blocks", "expected"),
    [
        (0, (0, 0, 0, 0, 0)),
        (1, (0, 0, 0, 0, 0)),  # vLLM keeps one block back
        (2000, (0, 0, 0, 6, 0)),
        (2001, (1, 1, 0, 6, 1)),
        (2064, (1, 1, 1, 6, 1)),
        (2304, (1, 1, 1, 7, 2)),  # 303 blocks more
        (4001, (2, 2, 1, 13, 7)),
    ],
)
def test_requests_in_a_pool(num_blocks: int, expected: tuple[int, ...]) -> None:
    """A prompt of 2,000 blocks, compressed to 240; with 1,000 tokens 2,063 and 303."""
    usage = request_usage(MODEL, setting(), 32_000, 1000)
    for spare in (0, 5 * LAYER - 1):
        found = capacity(usage, num_blocks * 5 * LAYER + spare)
        assert found == Capacity(*expected) and all(isinstance(n, int) for n in astuple(found))


@pytest.mark.parametrize(("num_blocks", "num_requests"), [(0, 0), (1, 0), (2, 1), (3, 2)])
def test_requests_of_one_block(num_blocks: int, num_requests: int) -> None:
    usage = request_usage(MODEL, setting(), 10)
    assert capacity(usage, num_blocks * 5 * LAYER) == Capacity(*[num_requests] * 5)


def test_longest_prompts_without_limits_and_without_room() -> None:
    inside = setting(trigger="prompt", budget={"tokens": 4096})
    assert longest_prompts(MODEL, inside, 2**40) == (2**20, 2**20), "none is known"
    for memory in (0, 1, 5 * LAYER):
        assert longest_prompts(MODEL, inside, memory) == (0, 0)
    found = longest_prompts(MODEL, inside, 101 * 5 * LAYER + 1)
    assert found == (1600, 1600) and all(isinstance(each, int) for each in found)
    # 3 and 2 layers in blocks of 2: three tables of 100 blocks, and one is left over.
    uneven = setting(trigger="prompt", layer_groups={"size": 3})
    assert longest_prompts(MODEL, uneven, 302 * 2 * LAYER) == (119 * 16, 1600)


@pytest.mark.parametrize(("text", "size"), [("1", 1), ("1B", 1), ("1.9B", 1), (" 2 kib ", 2048)])
def test_small_sizes_are_read(text: str, size: int) -> None:
    found = parse_size(text)
    assert found == size and isinstance(found, int)


def test_less_than_a_byte_is_no_size() -> None:
    with pytest.raises(ConfigError, match=r"'0\.9B' is not a size"):
        parse_size("0.9B")


@pytest.mark.parametrize("power", range(1, 5))
def test_sizes_change_their_unit_at_its_first_whole_number(power: int) -> None:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    size = 1024**power
    assert format_size(size) == f"1.0 {units[power]}"
    below = "1023 B" if power == 1 else f"1024.0 {units[power - 1]}"
    assert format_size(size - 1) == below

"""The line at start-up: whoever runs a server reads from it what compression will save.

A block of the layers here is 256 KiB of one layer (`wide`), so that sizes are round. Of 1,024
tokens, 64 blocks, a group keeps its budget of 32 tokens, 2 blocks.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

from tests.core.test_recurrent_groups import state_spec
from tests.core.test_whole_group import BLOCK, SETTING, spec
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.report import savings_line

HEADS = 256


def wide(layer_group: int | None = 0, block_size: int = BLOCK) -> Any:
    return spec(layer_group, block_size, HEADS)


def window(length: int) -> Any:
    return SlidingWindowSpec(
        block_size=BLOCK, num_kv_heads=HEADS, head_size=8, dtype=torch.float32,
        sliding_window=length,
    )  # fmt: skip


def eight_bits(layer_group: int | None = 0) -> Any:
    return replace(wide(layer_group), dtype=torch.float8_e4m3fn)


def line_of(
    setting: dict[str, Any], *groups: tuple[int, Any], max_len: int = 1024, num_blocks: int = 65
) -> str:
    """Groups are (number of layers, spec)."""
    found = [
        KVCacheGroupSpec([f"layers.{group}.{n}" for n in range(count)], each)
        for group, (count, each) in enumerate(groups)
    ]
    cache = KVCacheConfig(num_blocks, kv_cache_tensors=[], kv_cache_groups=found)
    config = parse_config({**SETTING, **setting})
    assert config is not None
    line = savings_line(config, cache, max_len)
    assert line.startswith(f"KV compression: policy {config.policy.name}, budget ")
    return line


def test_the_example_in_the_docs_is_what_the_log_says(root: Path) -> None:
    """Of `examples/offline.py`: four layers with two heads of 64 values of 16 bits."""
    pages = (root / "docs" / "getting-started.md").read_text(encoding="utf-8")
    layer = replace(spec(0, 32, 2), head_size=64, head_size_v=64, dtype=torch.bfloat16)
    setting = {"preset": "auto", "budget": {"ratio": 0.25}, "min_prompt_len": 512}
    line = line_of(setting, (4, layer), max_len=2048)
    assert f" {line} " in " ".join(pages.split()), line


# --- what is saved ------------------------------------------------------------------------

ONE = [(4, wide())]
OTHERS = [(4, wide()), (2, wide()), (0, wide()), (0, wide())]
"""Two of the groups have no layers on the first pipeline stage."""


@pytest.mark.parametrize(
    ("groups", "max_len", "expected"),
    [
        (ONE, 1024, "keeps 2 of 64 blocks (2.0 MiB of 64.0 MiB per worker)"),
        # 63 blocks, of which the last is not full: 62 are compacted to 2.
        (ONE, 1000, "keeps 3 of 63 blocks (3.0 MiB of 63.0 MiB per worker)"),
        (ONE, 16 * 1024, "keeps 2 of 1024 blocks (2.0 MiB of 1.0 GiB per worker)"),
        (ONE, 24 * 1024, "keeps 2 of 1536 blocks (2.0 MiB of 1.5 GiB per worker)"),
        # 4 * 64 blocks: of 1 MiB, 0.5 MiB, and as large as the largest twice.
        (OTHERS, 1024, "keeps 8 of 256 blocks (7.0 MiB of 224.0 MiB per worker)"),
        # A window of 40 tokens and a block more are 3.5 blocks.
        ([*ONE, (4, window(40))], 1024, "keeps 6 of 68 blocks (6.0 MiB of 68.0 MiB per worker)"),
        ([*ONE, (4, window(2000))], 1024, "keeps 66 of 128 blocks"),
        ([*ONE, (4, window(2000))], 32, "keeps 4 of 4 blocks"),
    ],
)
def test_blocks_and_bytes_of_the_longest_request(
    groups: list[tuple[int, Any]], max_len: int, expected: str
) -> None:
    assert f": a request of max_model_len {expected}" in line_of({}, *groups, max_len=max_len)


def test_groups_that_are_left_to_vllm_are_told_apart() -> None:
    """64, 32 in blocks of the draft model's size, 4 for each window, 2 for each kind of states."""
    beside = [(1, wide(None, 2 * BLOCK)), *[(1, window(40)), (1, state_spec())] * 2]
    line = line_of({}, (1, wide()), *beside)
    assert (
        "1 layer group(s) in 1 block table(s), block size 16, windowed layers left to vLLM in 2 "
        "more, recurrent states left to vLLM in 2 more, the draft model's cache kept whole in 1 "
        "more, prompts from"
    ) in line
    assert "keeps 46 of 108 blocks" in line
    assert "more" not in line_of({}, (1, wide()), (1, wide()))


def test_groups_without_layers_on_the_first_stage_are_named() -> None:
    assert ", blocks of 2 of them idle on the first pipeline stage, prompts" in line_of({}, *OTHERS)
    assert "idle" not in line_of({}, *ONE)


@pytest.mark.parametrize(
    ("beside", "is_said"),
    [([], True), ([(1, eight_bits(None))], True), ([(1, wide(None))], False)],
    ids=["alone", "draft model of 8 bits", "draft model of 32 bits"],
)
def test_eight_bits_and_fewer_tokens_are_multiplied(beside: Any, is_said: bool) -> None:
    """Half of the tokens in half of the bytes; not where a draft model has more bits."""
    half = {"budget": {"tokens": 512, "floor": 1}}
    line = line_of(half, (1, eight_bits()), *beside)
    share = "25%" if not beside else "38%"
    assert (" table(s), block size 16, cache of 8 bits, " in line) == is_said
    assert ("8 bits" in line) == is_said
    assert (f"is done, {share} of the bytes of a whole cache of 16 bits" in line) == is_said
    assert ("16 bits" in line) == is_said


# --- when ---------------------------------------------------------------------------------

IN_PROMPTS = {"trigger": "prompt", "prompt_interval": 256}
TASKS = {"localization": {}, "aggregation": {"budget": {"tokens": 64}}}
ALWAYS = {"shared_blocks": "always"}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({}, "budget 32 tokens (32 of 1024 tokens, uniform over layers), 1"),
        ({"budget": {"tokens": 5000}}, "budget 5000 tokens (1024 of 1024 tokens,"),
        ({"budget": {"ratio": 0.25}}, "budget 25% of the prompt (256 of 1024 tokens,"),
        ({"min_prompt_len": 100}, "block size 16, prompts from 100 tokens: a request"),
        ({"tasks": TASKS}, "block size 16, task auto, prompts"),
        (
            {"tasks": TASKS, "task": "aggregation"},
            "block size 16, task aggregation, prompts",
        ),
        (
            {"trigger": "both", "interval": 64},
            "once its prompt is done, back to its budget every 64 generated tokens",
        ),
        (
            {"trigger": "interval", "interval": 64},
            "block size 16, back to its budget every 64 generated tokens",
        ),
        ({"mode": "draft"}, "block size 16, mode draft: nothing is evicted; prompts from"),
        (
            {"draft": {"tokens": 4, "budget": {"tokens": 16}}},
            "once its prompt is done, 4 tokens drafted per step over a smaller view",
        ),
        (
            {"trigger": "pressure", "pressure": {"when": 0.9, "until": 0.6}},
            "block size 16, while memory is scarce only (from 90% of the blocks held to 60%, or a "
            "request gets none), prompts",
        ),
        (
            {"codebook": {"shallow": 1.0, "entries": 0.25}, "interval": 64},
            "block size 16, layer group(s) 0 coded by a codebook, generated tokens too every 64, "
            "prompts",
        ),
        # Behind a mark 32 tokens, to be rounded up to a block, and the next 256: 19 blocks.
        (
            IN_PROMPTS,
            "once its prompt is done, back to its budget every 256 tokens of the prompt, counted "
            "back from its end: no prompt holds more than 19 blocks on its way, of the pool's 64",
        ),
        (
            ALWAYS,
            "once its prompt is done, requests that share blocks at their marks as well: for each "
            "but one up to 2 blocks are set aside until then",
        ),
        # Of all 1,024 tokens 251, which are 16 blocks; of one token less 15.
        ({**ALWAYS, "budget": {"ratio": 0.245}}, "one up to 16 blocks are set"),
        # The longest prompt that is compacted while decoding has 1 token, or there is none.
        ({**ALWAYS, "trigger": "interval", "interval": 1023}, "one up to 2 blocks are set"),
        ({**ALWAYS, "trigger": "interval", "interval": 1024}, "one up to 0 blocks are set"),
    ],
)
def test_how_much_is_kept_and_when(setting: dict[str, Any], expected: str) -> None:
    assert expected in line_of(setting, *ONE)


def test_what_the_longest_prompt_holds_on_its_way_is_of_all_groups() -> None:
    groups = [(4, wide()), (4, wide()), (4, window(40))]
    assert "more than 42 blocks on its way, of the pool's 99" in line_of(
        IN_PROMPTS, *groups, num_blocks=100
    )
    assert "for each but one up to 4 blocks" in line_of(ALWAYS, *groups)

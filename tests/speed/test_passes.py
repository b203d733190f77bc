"""Bytes, FLOPs and launches of passes and kernels, against numbers worked out by hand."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.serving.models import MODELS
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.kernels import window_scores as window_kernel
from vllm_kvcompress.lengths.geometry import read_config, read_geometry
from vllm_kvcompress.speed import kernel_bytes
from vllm_kvcompress.speed.kernel_bytes import Heads
from vllm_kvcompress.speed.machine import Machine
from vllm_kvcompress.speed.passes import decode_step, prefill
from vllm_kvcompress.speed.paths import Path as Work
from vllm_kvcompress.speed.paths import Stage
from vllm_kvcompress.speed.shapes import ModelShape, read_shape

# 864 weights in layers, 160 in the head (see test_drafting.py); 64 bytes a cached token.
TINY = ModelShape(2, 8, 10, 4, 2, 2, 20, weight_bytes=2, cache_bytes=4)
LLAMA = Heads(32, 8, 128, 2)  # a token's keys are 2,048 bytes, its queries 8,192


# --- shapes -------------------------------------------------------------------------------


def test_a_rank_of_llama_70b() -> None:
    """Projections 2 * 8192 * 128 * (8 + 1), MLP 3 * 8192 * 3584, 80 layers, head 16032 * 8192."""
    whole = ModelShape(80, 8192, 28672, 64, 8, 128, 128_256)
    rank = whole.shard(8)
    assert rank.num_layer_weights == 80 * (18_874_368 + 88_080_384) == whole.num_layer_weights // 8
    assert rank.num_head_weights == 131_334_144
    assert rank.kv_token_bytes == 80 * 2 * 128 * 2
    assert rank.resident_bytes == 2 * (rank.num_layer_weights + 2 * 131_334_144)
    # Two sums a layer of 8192 numbers of two bytes, 7/8 of them sent twice.
    assert rank.link_bytes(3) == 2 * 80 * 3 * 8192 * 2 * 1.75
    assert whole.link_bytes(3) == 0
    assert whole.shard(16).num_kv_heads == 1, "KV heads are repeated"


@pytest.mark.parametrize("ranks", [3, 128])
def test_heads_that_cannot_be_split(ranks: int) -> None:
    with pytest.raises(ConfigError, match=f"--tensor-parallel-size {ranks}: must divide .* 64"):
        ModelShape(80, 8192, 28672, 64, 8, 128, 128_256).shard(ranks)


def write(folder: Path, **fields: object) -> Path:
    (folder / "config.json").write_text(json.dumps({**MODELS["qwen3-8b"], **fields}))
    return folder


def test_a_shape_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert read_shape(read_config(folder), read_geometry(folder)) == ModelShape.from_config(
        MODELS["qwen3-8b"]
    )
    geometry = read_geometry(folder, "float32")
    shape = read_shape(read_config(folder), geometry)
    assert (shape.weight_bytes, shape.cache_bytes) == (4, 4)


def test_shapes_that_are_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path, num_experts=64)
    with pytest.raises(UnsupportedModelError, match="--speed: .*mixture of experts"):
        read_shape(read_config(folder), read_geometry(folder))
    folder = write(tmp_path, intermediate_size=None)
    with pytest.raises(ConfigError, match="the field intermediate_size is missing"):
        read_shape(read_config(folder), read_geometry(folder))
    folder = write(tmp_path, vocab_size=0)
    with pytest.raises(ConfigError, match="vocab_size must be a whole number from 1 up, got 0"):
        read_shape(read_config(folder), read_geometry(folder))


# --- passes -------------------------------------------------------------------------------


def test_a_prompt_by_hand() -> None:
    """Ten tokens in chunks of 4, 4 and 2, which read 4, 8 and 10 tokens of the cache."""
    matrices, attention = prefill(TINY, 10, chunk_tokens=4).stages
    assert (matrices.read, matrices.written) == (3 * 2048, 0)
    assert matrices.flops == 2 * 864 * 10 + 2 * 160
    assert (attention.read, attention.written) == (22 * 64, 10 * 64)
    assert attention.flops == 64 * 55, "a token attends to itself and those before"
    assert (matrices.launches, attention.launches) == (3 * (2 * 9 + 1), 3 * 2)


def test_prompts_share_chunks() -> None:
    one, two = prefill(TINY, 10, 1, 4), prefill(TINY, 10, 2, 4)
    assert two.stage("matrices").read == 5 * 2048
    assert two.stage("attention").read == 2 * one.stage("attention").read
    assert two.flops == 2 * one.flops


def test_a_step_by_hand() -> None:
    matrices, attention = decode_step(TINY, 3, 100, queries=2, attended=150, launches=4).stages
    assert (matrices.read, matrices.flops, matrices.launches) == (2048, 2 * 1024 * 6, 4)
    assert (attention.read, attention.written) == (3 * 100 * 64, 6 * 64)
    assert (attention.flops, attention.launches) == (64 * 6 * 150, 0)
    assert decode_step(TINY, 3, 100).stage("attention").flops == 64 * 3 * 100


# --- time ---------------------------------------------------------------------------------


def test_the_longer_of_bytes_and_flops_then_the_link() -> None:
    machine = Machine(bandwidth=10, flops=100, link_bandwidth=5)
    assert Stage("", read=30, written=20, flops=400).device_seconds(machine) == 5
    assert Stage("", read=30, written=20, flops=600).device_seconds(machine) == 6
    assert Stage("", read=50, link_bytes=10).device_seconds(machine) == 7


def test_the_longer_of_device_and_host() -> None:
    machine = Machine(bandwidth=10, launch_seconds=0.5)
    path = Work((Stage("a", read=50, launches=3), Stage("b", read=20, launches=2)))
    assert (path.device_seconds(machine), path.host_seconds(machine)) == (7, 2.5)
    assert path.seconds(machine) == 7
    assert Work((*path.stages, Stage("c", launches=20))).seconds(machine) == 12.5
    assert path.times(3).seconds(machine) == 21
    assert Work.of([path, path]) == Work(path.stages * 2)


@given(st.integers(1, 300_000), st.integers(1, 512), st.floats(1e9, 1e13), st.floats(1e10, 1e16))
def test_faster_machines_and_smaller_work_take_less(
    tokens: int, batch: int, bandwidth: float, flops: float
) -> None:
    machine = Machine(bandwidth, flops)
    time = decode_step(TINY, batch, tokens).seconds(machine)
    assert time <= decode_step(TINY, batch, tokens).seconds(Machine(bandwidth / 2, flops))
    assert time <= decode_step(TINY, batch, tokens).seconds(Machine(bandwidth, flops / 2))
    assert time < decode_step(TINY, batch, tokens + 1).seconds(machine)
    assert time < decode_step(TINY, batch + 1, tokens).seconds(machine)
    # Two requests share what one reads of the weights.
    both = decode_step(TINY, 2 * batch, tokens).seconds(Machine(bandwidth, math.inf))
    assert both < 2 * decode_step(TINY, batch, tokens).seconds(Machine(bandwidth, math.inf))


# --- kernels ------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    """1,000 tokens: keys 2,048,000 bytes; 16 queries 131,072; a number per token 32,000."""
    tokens = kernel_bytes.token_scores(LLAMA, 1000, 16)
    assert (tokens.read, tokens.written) == (2 * (2_048_000 + 131_072), 32_000)
    assert (tokens.flops, tokens.kernels) == (2 * 2 * 16 * 32 * 1000 * 128, 3)
    windows = kernel_bytes.window_scores(LLAMA, 1000, 16, 32)
    assert (windows.read, windows.written) == (2_048_000 + 131_072, 4 * 8 * 32)
    assert windows.flops == tokens.flops / 2
    heads = kernel_bytes.head_scores(LLAMA, 1000, 16)  # scores of 32 heads, once more in order
    assert heads.read == 4 * 2 * 2_048_000 + 2 * 131_072 + 128_000
    assert (heads.written, heads.operations) == (2 * 128_000, 3)
    for name in ("key_similarity", "lag_scores"):
        found = getattr(kernel_bytes, name)(LLAMA, 1000)
        assert (found.read, found.written) == (2 * 2_048_000, 32_000)


def test_the_rest_of_a_compaction_by_hand() -> None:
    chosen = kernel_bytes.select_tokens(LLAMA, 4, 1000, 128)
    assert (chosen.read, chosen.written) == (4 * 8 * 20_000 + 1000, 4 * 8 * 1024)
    moved = kernel_bytes.compact_pages(LLAMA, 4, 128)
    assert (moved.read, moved.written) == (4 * 128 * (4096 + 64), 4 * 128 * 4096)
    kept = kernel_bytes.store_rows(LLAMA, 1000, 16)
    assert (kept.read, kept.written) == (8000 + 131_072, 131_072)
    book = kernel_bytes.build_codebook(LLAMA, 1024)  # 16 problems
    assert book.written == 16 * (1024 * 1024 // 8 + 4096)
    assert book.read == 16 * (3 * 1024 * 256 + 1024 * 1024 // 16 + 12 * 1024)
    assert book.flops == 16 * 2 * 1024 * 1024 * 128


def test_window_sizes_are_those_of_the_kernel() -> None:
    for size in range(1, 5000):
        assert kernel_bytes.takes_window_size(size) == window_kernel.takes_window_size(size), size

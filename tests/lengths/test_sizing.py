"""The arithmetic of `kvcompress plan`: against numbers worked out by hand, vLLM and the planner."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import groups_of_one_page_size
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.lengths.budgets import layer_groups
from vllm_kvcompress.lengths.geometry import ModelGeometry, read_geometry
from vllm_kvcompress.lengths.longest_peak import longest_prompt_peak
from vllm_kvcompress.lengths.sizing import (
    block_tables,
    capacity,
    format_size,
    longest_prompts,
    parse_size,
    request_usage,
)
from vllm_kvcompress.plans import RequestOptions
from vllm_kvcompress.spec import CompressedAttentionSpec

LLAMA_8B = ModelGeometry(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")


def setting(**fields: Any) -> Any:
    return parse_config({"preset": "streaming_llm", **fields})


# --- sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("40GiB", 40 << 30),
        ("40GB", 40 * 10**9),
        ("1.5 gib", 3 << 29),
        ("512MiB", 512 << 20),
        ("2TB", 2 * 10**12),
        ("100B", 100),
        ("42949672960", 40 << 30),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "40G", "forty", "40 GiBs", "-1GiB", "0", "0.1", "1e9"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="40GiB, 40GB or a number of bytes") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"), [(7, "7 B"), (1536, "1.5 KiB"), (40 << 30, "40.0 GiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes_are_written(size: int, text: str) -> None:
    assert format_size(size) == text


# --- models -------------------------------------------------------------------------------

PLAIN = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 131072,
}

LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "model_type": "deepseek_v2"}


def geometry_of(folder: Path, fields: dict[str, Any], dtype: str = "auto") -> ModelGeometry:
    (folder / "config.json").write_text(json.dumps(fields))
    return read_geometry(folder, dtype)


def test_a_model_is_read(tmp_path: Path, probe_model: str) -> None:
    assert read_geometry(Path(probe_model)) == ModelGeometry(4, 2, 64, "bfloat16", 8192)
    assert geometry_of(tmp_path, PLAIN) == ModelGeometry(32, 8, 128, "bfloat16", 131072)


def test_fields_have_the_usual_fallbacks(tmp_path: Path) -> None:
    assert geometry_of(tmp_path, PLAIN | {"head_dim": 64}).head_dim == 64
    assert geometry_of(tmp_path, PLAIN | {"head_dim": None}).head_dim == 128
    assert geometry_of(tmp_path, PLAIN | {"num_key_value_heads": None}).num_kv_heads == 32
    assert geometry_of(tmp_path, PLAIN | {"torch_dtype": "float16"}).dtype == "float16"
    assert geometry_of(tmp_path, PLAIN | {"dtype": "float16"}).dtype == "float16"
    assert geometry_of(tmp_path, PLAIN | {"torch_dtype": "float32"}).dtype == "bfloat16"
    assert geometry_of(tmp_path, PLAIN, "float32").dtype == "float32"
    nested = {"dtype": "float16", "text_config": {**PLAIN, "torch_dtype": None}}
    assert geometry_of(tmp_path, nested) == ModelGeometry(32, 8, 128, "float16", 131072)


@pytest.mark.parametrize(
    ("quantized", "asked", "bytes_per_number"),
    [
        (None, "auto", 2),
        (None, "fp8", 1),
        (None, "fp8_e5m2", 1),
        ({"kv_cache_scheme": {"type": "float", "num_bits": 8}}, "auto", 1),
        ({"kv_cache_scheme": {"type": "float", "num_bits": 8}}, "bfloat16", 2),
        ({"kv_cache_scheme": {"type": "int", "num_bits": 8}}, "auto", 2),
        ({"kv_cache_scheme": None, "kv_cache_quant_algo": "FP8"}, "auto", 1),
        ({"kv_cache_quant_algo": None}, "auto", 2),
    ],
)
def test_the_cache_may_have_another_type(
    tmp_path: Path, quantized: dict | None, asked: str, bytes_per_number: int
) -> None:
    """Which some checkpoints ask for by themselves."""
    fields = PLAIN if quantized is None else {**PLAIN, "quantization_config": quantized}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = read_geometry(tmp_path, cache_dtype=asked)
    assert model.dtype == "bfloat16" and model.cache_bytes == bytes_per_number
    assert model.has_eight_bits == (bytes_per_number == 1)
    assert model.page_bytes(16) == 2 * 16 * 8 * 128 * bytes_per_number


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": None}, ["config.json", "num_hidden_layers is missing"]),
        ({"num_key_value_heads": "8"}, ["num_key_value_heads", "whole number", "'8'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "from 1 up", "0"]),
        ({"torch_dtype": "int8"}, ["dtype", "'int8'", "--dtype", "bfloat16"]),
    ],
)
def test_wrong_fields_are_one_sentence(tmp_path: Path, change: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        geometry_of(tmp_path, PLAIN | change)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    for word in words:
        assert word in message


def test_missing_and_broken_files_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder .*nowhere"):
        read_geometry(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        read_geometry(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_geometry(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="an object of fields"):
        read_geometry(tmp_path)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (LATENT, "latent attention .MLA., which the server compresses and this command"),
        (LATENT | {"index_topk": 2048}, "sparse latent attention"),
        ({"kv_lora_rank": 256, "model_type": "minicpm3"}, "MLA. of the kind minicpm3"),
        ({"sliding_window": 4096}, "sliding-window"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"num_kv_shared_layers": 18}, "share the KV cache of others"),
    ],
)
def test_what_the_server_refuses_is_refused(tmp_path: Path, change: dict, kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=kind):
        geometry_of(tmp_path, PLAIN | change)


def test_a_latent_row_serves_all_heads(tmp_path: Path) -> None:
    """DeepSeek-V2-Lite: 576 numbers per token and layer, and no values."""
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | LATENT))
    found = read_geometry(tmp_path, "bfloat16", latent=True)
    assert (found.is_latent, found.num_kv_heads, found.head_dim) == (True, 1, 576)
    assert found.page_bytes(16) == 16 * 576 * 2
    assert found.heads_per_worker(1) == "latent rows of 576"


def test_a_window_that_is_not_used_is_no_reason(tmp_path: Path) -> None:
    for change in (
        {"sliding_window": None},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"sliding_window": 4096, "layer_types": ["full_attention"] * 32},
    ):
        assert geometry_of(tmp_path, PLAIN | change).num_layers == 32


def test_the_text_part_of_a_multimodal_model(tmp_path: Path) -> None:
    """As Gemma 3's files are: what the class says by itself is left out of them."""
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 34, "sliding_window": 1024,
    }  # fmt: skip
    found = geometry_of(
        tmp_path,
        {"model_type": "gemma3", "dtype": "bfloat16", "text_config": text, "vision_config": {}},
    )
    assert (found.num_layers, found.num_windowed, found.window) == (5, 29, 1024)
    assert (found.num_kv_heads, found.head_dim, found.dtype) == (4, 256, "bfloat16")


def test_a_multimodal_model_that_transformers_do_not_know(tmp_path: Path) -> None:
    found = geometry_of(tmp_path, {"model_type": "nobody", "text_config": PLAIN})
    assert found == geometry_of(tmp_path, PLAIN)


def test_windowed_layers_are_left_alone(tmp_path: Path) -> None:
    change = {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 16}
    found = geometry_of(tmp_path, PLAIN | change)
    assert (found.num_layers, found.num_windowed, found.window) == (16, 16, 512)


def test_recurrent_layers_are_left_alone(tmp_path: Path) -> None:
    change = {
        "architectures": ["Qwen3NextForCausalLM"],
        "full_attention_interval": 4,
        "num_hidden_layers": 48,
    }
    found = geometry_of(tmp_path, PLAIN | change)
    assert (found.num_layers, found.num_recurrent, found.num_windowed) == (12, 36, 0)
    with pytest.raises(UnsupportedModelError, match="recurrent layers and an architecture"):
        geometry_of(tmp_path, PLAIN | change | {"architectures": ["OtherForCausalLM"]})


def test_heads_are_divided_among_workers_and_repeated() -> None:
    assert [LLAMA_8B.kv_heads_per_worker(size) for size in (1, 2, 8, 16)] == [8, 4, 1, 1]
    with pytest.raises(ConfigError, match="--tensor-parallel-size 3: must divide .* 8 KV heads"):
        LLAMA_8B.kv_heads_per_worker(3)


# --- the pool -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 4, 13, 32, 80])
@pytest.mark.parametrize("groups", [{"count": n} for n in (1, 3, 4, 80)] + [{"size": 30}])
def test_block_tables_are_vllms(num_layers: int, groups: dict[str, int]) -> None:
    config = setting(layer_groups=groups)
    group_of_layer = layer_groups(num_layers, config.layer_groups)
    specs = {
        f"layers.{layer}": CompressedAttentionSpec(
            block_size=16, num_kv_heads=4, head_size=128, dtype=torch.bfloat16, layer_group=group
        )
        for layer, group in enumerate(group_of_layer)
    }
    tables, width = block_tables(group_of_layer)
    theirs = groups_of_one_page_size(specs)
    owners = [each.kv_cache_spec.layer_group for each in theirs]
    assert tables == [owners.count(group) for group in range(max(group_of_layer) + 1)]
    assert width == max(len(each.layer_names) for each in theirs)
    usage = request_usage(
        ModelGeometry(num_layers, 8, 128, "bfloat16"), config, 4096, tensor_parallel_size=2
    )
    assert usage.block_bytes == width * theirs[0].kv_cache_spec.page_size_bytes


def test_one_request_by_hand() -> None:
    """Llama 8B: 128 KiB per token, 2 MiB per block of 16; 12 % of 32,000 is 3,840 = 240 blocks."""
    usage = request_usage(LLAMA_8B, setting(), 32_000, output_len=1000)
    assert usage.block_bytes == usage.stock_block_bytes == 2 << 20
    assert (usage.blocks_before, usage.blocks_after) == (2000, 240)
    assert (usage.blocks_peak, usage.blocks_needed) == (2240, 2000)
    assert usage.blocks_decoding == 303  # 4,840 tokens
    assert (usage.stock_blocks_prompt, usage.stock_blocks_decoding) == (2000, 2063)
    assert usage.padding == 0
    (group,) = usage.groups
    assert (group.tokens_before, group.tokens_after) == (32_000, 3840)
    # 40 GiB are 20,480 blocks, one of which vLLM keeps back.
    fit = capacity(usage, 40 << 30)
    assert (fit.stock_prompts, fit.prompts) == (10, 10)
    assert (fit.stock_decoding, fit.decoding) == (9, 67)
    assert fit.one_by_one == 61  # 60 * 303 + 2000 = 20,180; one more would be 20,483


def test_the_tail_behind_the_region_is_kept() -> None:
    usage = request_usage(LLAMA_8B, setting(), 32_007)
    assert usage.blocks_before == 2001
    assert usage.groups[0].tokens_after == 3840 + 7
    assert usage.blocks_after == 241
    assert usage.blocks_peak == 2001 + 240, "the tail's block is not copied"


def test_tensor_parallel_workers_hold_their_share() -> None:
    whole = request_usage(LLAMA_8B, setting(), 32_000)
    part = request_usage(LLAMA_8B, setting(), 32_000, tensor_parallel_size=4)
    assert part.block_bytes * 4 == whole.block_bytes
    assert part.blocks_after == whole.blocks_after


def test_layer_groups_keep_their_own_budgets_over_one_pool() -> None:
    config = setting(layer_groups={"count": 4}, layer_budget={"shape": "pyramid"})
    usage = request_usage(LLAMA_8B, config, 32_000)
    kept = [group.tokens_after for group in usage.groups]
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]
    assert [group.first_layer for group in usage.groups] == [0, 8, 16, 24]
    assert usage.block_bytes * 4 == usage.stock_block_bytes
    assert usage.blocks_before == 4 * 2000
    assert usage.blocks_after == sum(kept) // 16


def test_unequal_groups_waste_what_vllm_pads() -> None:
    model = ModelGeometry(5, 8, 128, "bfloat16")
    usage = request_usage(model, setting(layer_groups={"size": 3}), 32_000)
    assert [group.num_tables for group in usage.groups] == [2, 1]  # 3 and 2 layers, cut to twos
    assert usage.padding == pytest.approx(1 / 6)


def test_groups_of_a_size_are_spread_evenly() -> None:
    model = ModelGeometry(80, 8, 128, "bfloat16")
    usage = request_usage(model, setting(layer_groups={"size": 30}), 32_000)
    assert [group.num_tables for group in usage.groups] == [1, 1, 1]  # 27, 27 and 26
    assert usage.padding == pytest.approx(1 / 81)


def test_a_prompt_within_its_budget_is_left_alone() -> None:
    for config in (setting(min_prompt_len=40_000), setting(budget={"ratio": 1.0})):
        usage = request_usage(LLAMA_8B, config, 32_000, output_len=16)
        assert usage.compacted_at is None
        assert usage.blocks_before == usage.blocks_after == 2000
        assert usage.blocks_peak == usage.blocks_decoding == usage.stock_blocks_decoding == 2001


def test_a_pool_without_room_for_the_copy_is_large_enough() -> None:
    """Survivors overwrite blocks of the request then."""
    usage = request_usage(LLAMA_8B, setting(), 32_000)
    assert capacity(usage, 2000 * usage.block_bytes).one_by_one == 0
    assert capacity(usage, 2001 * usage.block_bytes).one_by_one == 1
    assert capacity(usage, 1).prompts == 0


def test_compactions_inside_the_prompt_bound_what_is_held() -> None:
    """12 % of 32,000 is 3,840; 2,048 more come between two marks; the last way is 1,280 long."""
    usage = request_usage(LLAMA_8B, setting(trigger="prompt"), 32_000, output_len=1000)
    assert (usage.blocks_before, usage.blocks_after) == (2000, 240)
    assert usage.blocks_prompt == usage.blocks_needed == (3840 + 2048) // 16
    assert usage.blocks_peak == usage.blocks_needed + 240
    assert (usage.compacted_at, usage.blocks_decoding) == (32_000, 303)
    fit = capacity(usage, 40 << 30)
    assert (fit.prompts, fit.one_by_one) == (55, 67)


def test_longest_prompts_that_fit() -> None:
    model = ModelGeometry(32, 8, 128, "bfloat16", 131_072)
    memory = 501 * 16 * 128 * 1024  # 500 blocks of 16 tokens, and the one that vLLM keeps back
    assert longest_prompts(model, setting(), memory) == (8000, 8000)
    inside = setting(trigger="prompt", budget={"tokens": 4096})
    assert longest_prompts(model, inside, memory) == (8000, 131_072)
    assert longest_prompts(model, inside, memory, tensor_parallel_size=2) == (16_016, 131_072)
    stock, longest = longest_prompts(model, setting(trigger="prompt"), memory)
    assert stock == 8000 < 40_000 < longest < 60_000
    shape = 1, 16
    (peak,) = longest_prompt_peak(longest, setting(trigger="prompt"), *shape)
    assert peak <= 8000 < longest_prompt_peak(longest + 1, setting(trigger="prompt"), *shape)[0]


@pytest.mark.parametrize("trigger", ["end_of_prompt", "interval", "both"])
@pytest.mark.parametrize("prompt_len", [300, 1000, 1003])
def test_compactions_are_the_planners(trigger: str, prompt_len: int) -> None:
    """Step through the same request with the scheduler's own planner, token by token."""
    config = setting(
        trigger=trigger,
        interval=100,
        min_prompt_len=256,
        budget={"tokens": 200},
        layer_groups={"count": 2},
        layer_budget={"shape": "pyramid"},
        pinned=[[10, 50]],
    )
    usage = request_usage(LLAMA_8B, config, prompt_len, output_len=777)
    planner = Planner(config, num_layer_groups=2, block_size=16)
    tracked = planner.add("request", prompt_len, RequestOptions())
    first, peak, held = None, 0, []
    evicted = [0, 0]
    for position in range(prompt_len, prompt_len + 777 + 1):
        blocks = sum(-(-(position - each) // 16) for each in evicted)
        if first is not None:
            held.append(blocks)
        if not planner.note_progress("request", position):
            continue
        lengths = tracked.compaction.lengths
        peak = max(peak, blocks + sum(each.kept_len // 16 for each in lengths if each))
        for group, each in enumerate(lengths):
            evicted[group] += each.evicted if each else 0
        planner.commit(tracked)
        first = first or (position, blocks, [position - each for each in evicted])
    assert first is not None
    assert usage.compacted_at == first[0]
    assert usage.blocks_before == first[1]
    assert [group.tokens_after for group in usage.groups] == first[2]
    assert usage.blocks_peak == peak
    assert usage.blocks_decoding == max(held)

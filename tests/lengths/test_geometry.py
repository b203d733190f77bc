"""What ``config.json`` says of the cache; heads of several sizes among it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma4TextConfig

from lab.random_configs import CONFIGS
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.lengths.geometry import ModelGeometry, read_geometry


@pytest.mark.parametrize("form", ["published", "layer by layer"])
@pytest.mark.parametrize("shares_keys", [True, False])
def test_full_layers_of_gemma_4(tmp_path: Path, form: str, shares_keys: bool) -> None:
    """Their heads are larger; only where keys are the values, they have a number of their own."""
    fields = {**CONFIGS["gemma4"], "attention_k_eq_v": shares_keys}
    if form == "layer by layer":
        fields = Gemma4TextConfig(**fields).to_dict()
        assert "per_layer_config" in fields
    (tmp_path / "config.json").write_text(json.dumps(fields, default=str))
    heads = 1 if shares_keys else 2
    expected = ModelGeometry(2, heads, 64, "bfloat16", 4096, num_windowed=2, window=96)
    assert read_geometry(tmp_path) == expected


def test_heads_of_gemma_4_in_a_multimodal_file(tmp_path: Path) -> None:
    """Transformers make them of it, layer by layer."""
    text = {**CONFIGS["gemma4"], "attention_k_eq_v": True}
    fields = {"model_type": "gemma4", "dtype": "float16", "text_config": text}
    found = read(tmp_path, json.loads(json.dumps(fields, default=str)))
    assert (found.num_layers, found.num_kv_heads, found.head_dim) == (2, 1, 64)


PLAIN = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 516,  # 64 numbers and a half for a head: no model has it, and 64 are counted
    "max_position_embeddings": 4096,
}
FP8 = {"type": "float", "num_bits": 8}
MIXED = {"sliding_window": 4096, "layer_types": ["sliding_attention", "full_attention"] * 2}
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "model_type": "deepseek_v2"}


def read(folder: Path, fields: dict[str, Any], **how: Any) -> ModelGeometry:
    (folder / "config.json").write_text(json.dumps(fields))
    return read_geometry(folder, **how)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"dtype": "bfloat16", "head_dim": 64, "num_kv_heads": 2, "window": None}),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, {"dtype": "float16"}),
        ({"torch_dtype": "torch.float16"}, {"dtype": "float16"}),
        ({"num_attention_heads": 1, "num_key_value_heads": 1}, {"num_kv_heads": 1}),
        ({"num_hidden_layers": 1}, {"num_layers": 1}),
        ({"max_position_embeddings": None}, {"max_positions": None}),
        ({"max_position_embeddings": "long"}, {"max_positions": None}),
        ({"text_config": None}, {"num_layers": 4}),
        # No sequence outgrows the window of the second; the third does not use it.
        (MIXED | {"max_position_embeddings": 4097}, {"num_layers": 2, "window": 4096}),
        (MIXED, {"num_layers": 4, "num_windowed": 0, "window": None}),
        (MIXED | {"use_sliding_window": False}, {"num_layers": 4, "window": None}),
        ({"global_head_dim": 128}, {"head_dim": 128, "num_kv_heads": 2}),
        ({"num_global_key_value_heads": 1}, {"num_kv_heads": 2}),
        ({"per_layer_config": {"0": None}}, {"head_dim": 64}),
        ({"per_layer_config": {"1": {"head_dim": 8}}}, {"head_dim": 64}),
        ({"quantization_config": None}, {"cache_dtype": "auto"}),
        ({"quantization_config": {"kv_cache_scheme": "FP8"}}, {"cache_dtype": "fp8"}),
        ({"quantization_config": {"kv_cache_scheme": FP8 | {"num_bits": 4}}}, {"cache_bytes": 2}),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, {"cache_dtype": "auto"}),
        ({"quantization_config": {"kv_cache_quant_algo": "NVFP4"}}, {"cache_dtype": "auto"}),
    ],
    ids=str,
)
def test_what_fields_mean(tmp_path: Path, change: dict, expected: dict[str, Any]) -> None:
    found = read(tmp_path, PLAIN | change)
    assert {name: getattr(found, name) for name in expected} == expected


def test_types_that_are_asked_for_come_first(tmp_path: Path) -> None:
    fields = PLAIN | {"dtype": "float16", "quantization_config": {"kv_cache_scheme": FP8}}
    assert str(read(tmp_path, fields)) == "float16, cache fp8"
    found = read(tmp_path, fields, dtype="float32", cache_dtype="bfloat16")
    assert str(found) == "float32, cache bfloat16" and found.page_bytes(16) == 16 * 2 * 2 * 64 * 2
    # A part's own type comes before the whole file's.
    nested = {"dtype": "bfloat16", "text_config": PLAIN | {"torch_dtype": "float16"}}
    assert str(read(tmp_path, nested)) == "float16"


def test_latent_rows_whatever_the_heads(tmp_path: Path) -> None:
    found = read(tmp_path, PLAIN | LATENT | {"head_dim": 8}, latent=True)
    assert (found.is_latent, found.num_kv_heads, found.head_dim) == (True, 1, 576)
    for name in ("kv_lora_rank", "qk_rope_head_dim"):
        with pytest.raises(ConfigError, match=rf"config\.json: {name} must be a whole number"):
            read(tmp_path, PLAIN | LATENT | {name: "many"}, latent=True)


@pytest.mark.parametrize("value", [True, 0, -1, 4.0, "4"])
def test_numbers_of_things_are_whole(tmp_path: Path, value: object) -> None:
    name = "num_hidden_layers"
    with pytest.raises(
        ConfigError, match=rf"config\.json: {name} must .* from 1 up, got {value!r}"
    ):
        read(tmp_path, PLAIN | {name: value})


@pytest.mark.deep
def test_an_unknown_type_and_a_file_that_nests_too_deep(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: dtype 'int8' is unknown"):
        read(tmp_path, PLAIN | {"dtype": "int8"})
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
        read_geometry(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (LATENT, "has latent attention"),
        (LATENT | {"model_type": "other"}, "has latent attention .MLA. of the kind other"),
        ({"is_encoder_decoder": True}, "is an encoder-decoder model"),
        ({"num_kv_shared_layers": 2}, "has layers that share"),
        (
            {"layer_types": ["full_attention", "odd", "chunked", "odd"]},
            "has layers of the kind chu",
        ),
        ({"sliding_window": 512}, "has sliding-window layers only"),
        # No architecture, or none that was tried.
        ({"full_attention_interval": 2}, "has recurrent layers and"),
        ({"full_attention_interval": 2, "architectures": None}, "has recurrent layers and"),
    ],
)
def test_refusals_name_the_folder(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^--model: {tmp_path} {words}"):
        read(tmp_path, PLAIN | change)


def test_a_part_is_refused_as_a_whole_file_is(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="share the KV cache of others"):
        read(tmp_path, {"text_config": PLAIN | {"num_kv_shared_layers": 2}})


@pytest.mark.parametrize(
    ("num_heads", "num_workers", "each"),
    [(8, 1, 8), (8, 2, 4), (8, 8, 1), (8, 16, 1), (1, 4, 1), (6, 3, 2)],
)
def test_heads_of_one_worker(num_heads: int, num_workers: int, each: int) -> None:
    model = ModelGeometry(1, num_heads, 64, "float16")
    assert model.kv_heads_per_worker(num_workers) == each
    assert model.heads_per_worker(num_workers) == f"KV heads {each} x 64"
    assert model.page_bytes(16, num_workers) == 2 * 16 * each * 64 * 2


@pytest.mark.parametrize(("num_heads", "num_workers"), [(8, 3), (8, 12), (2, 3)])
def test_heads_that_cannot_be_divided(num_heads: int, num_workers: int) -> None:
    model = ModelGeometry(1, num_heads, 64, "float16")
    with pytest.raises(ConfigError, match=f"^--tensor-parallel-size {num_workers}: must divide"):
        model.kv_heads_per_worker(num_workers)

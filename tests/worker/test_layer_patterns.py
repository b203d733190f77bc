"""Which layers vLLM's model classes give a window, against what configurations are read as.

The real classes, on torch's meta device, with layer patterns that no default explains.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.utils import initialize_model

from lab.random_models import write_random_model
from vllm_kvcompress.host.model_checks import check_layer
from vllm_kvcompress.lengths.layer_kinds import UNTURNED, full_layers
from vllm_kvcompress.worker.compaction.layer_parts import LayerParts, softmax_terms

SLIDING, FULL = "sliding_attention", "full_attention"
THREE_TO_ONE = [SLIDING] * 3 + [FULL] + [SLIDING] * 2
PHI = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "pad_token_id": 0,
    "sliding_window": 262144,
}
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "gemma2": ("gemma2", {}, (1, 3)),
    "gemma2, by default": ("gemma2", {"layer_types": None}, (1, 3)),
    "gemma3": ("gemma3", {"layer_types": THREE_TO_ONE}, (3,)),
    "gemma3, by default": (
        "gemma3",
        {"layer_types": None, "num_hidden_layers": 7, "sliding_window_pattern": 3},
        (2, 5),
    ),
    "gpt_oss": ("gpt_oss", {}, (1, 3)),
    "exaone4": ("exaone4", {"layer_types": THREE_TO_ONE}, (3,)),
    "exaone4, all full": (
        "exaone4",
        {"layer_types": [FULL] * 4, "sliding_window": None},
        (0, 1, 2, 3),
    ),
    "exaone4, window above its length": (
        "exaone4",
        {"layer_types": THREE_TO_ONE, "sliding_window": 4096},
        (0, 1, 2, 3, 4, 5),
    ),
    "cohere2": ("cohere2", {"layer_types": THREE_TO_ONE}, (3,)),
    "cohere2, by default": ("cohere2", {"layer_types": None, "num_hidden_layers": 9}, (3, 7)),
    "phi-4-mini": ("llama", PHI, (0, 1, 2, 3)),
    "phi-3 with a window": ("llama", {**PHI, "sliding_window": 64}, ()),
}


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    place = tmp_path_factory.mktemp("rendezvous") / "file"
    config = EngineArgs(
        model=str(write_random_model(place.parent, "llama")), skip_tokenizer_init=True
    ).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{place}", 0, "gloo")
        initialize_model_parallel(1, 1)
    yield
    cleanup_dist_env_and_memory()


def built(folder: Path, name: str, fields: dict[str, Any]) -> tuple[Any, Any]:
    """vLLM's configuration and its model, without weights."""
    write_random_model(folder, name)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    if types := config.get("layer_types"):
        config["num_hidden_layers"] = len(types)
    if fields.get("layer_types", "given") is None:
        del config["layer_types"]
    path.write_text(json.dumps(config))
    args = EngineArgs(model=str(folder), dtype="float32", skip_tokenizer_init=True, block_size=32)
    vllm_config = args.create_engine_config()
    with set_current_vllm_config(vllm_config), torch.device("meta"):
        return vllm_config, initialize_model(vllm_config)


@pytest.mark.parametrize(("name", "fields", "expected"), CASES.values(), ids=list(CASES))
def test_windows_are_where_the_configuration_says(
    tmp_path: Path, name: str, fields: dict[str, Any], expected: tuple[int, ...]
) -> None:
    config, model = built(tmp_path, name, fields)
    text, max_len = config.model_config.hf_text_config, config.model_config.max_model_len
    assert full_layers(text, max_len) == expected
    layers = {
        layer_name: layer
        for layer_name, layer in config.compilation_config.static_forward_context.items()
        if isinstance(layer, Attention)
    }
    assert len(layers) == text.num_hidden_layers
    whole = [
        int(layer_name.split(".")[2])
        for layer_name, layer in layers.items()
        if layer.sliding_window is None or layer.sliding_window >= max_len
    ]
    assert tuple(sorted(whole)) == expected
    for number in expected:
        layer_name = next(each for each in layers if each.split(".")[2] == str(number))
        layer = layers[layer_name]
        check_layer(layer_name, layer)
        terms = softmax_terms(layer.impl)
        assert terms.soft_cap == (3.0 if name == "gemma2" else 0.0)
        assert (terms.sinks is not None) == (name == "gpt_oss")
        if terms.sinks is not None:
            assert terms.sinks.shape == (layer.num_heads,)
        rotary = LayerParts(model, config.model_config, torch.device("cpu")).rotary(layer_name)
        if name == "gpt_oss":
            assert rotary is None, "YaRN is not plain"
            continue
        assert rotary is not None
        kinds = getattr(text, "layer_types", None) or [FULL]
        leaves_full = name in UNTURNED and SLIDING in kinds
        assert bool(rotary.inv_freq.any()) != (leaves_full and kinds[number] == FULL)
        if name == "gemma3":
            base = 1_000_000.0  # the full layers' own; windowed ones have 10,000
            torch.testing.assert_close(rotary.inv_freq, base ** (-torch.arange(16) / 16))

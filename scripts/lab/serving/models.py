"""Models of real size for ``scripts/bench_serving.py``: configurations and tokenizers, no weights.

Servers fill them with vLLM's dummy weights. What a step costs depends on shapes alone.
"""

import json
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
}

# The public config.json of both large models; `model_config` raises max_position_embeddings where
# a prompt needs it, which changes neither weights nor the cost of a token.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 0,
        "dtype": "float32",
        "eos_token_id": 1,
        "head_dim": 32,
        "hidden_size": 256,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "vocab_size": 2048,
    },
    "llama-3-8b": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 128000,
        "dtype": "bfloat16",
        "eos_token_id": 128001,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "vocab_size": 128256,
    },
    "qwen3-8b": {
        **_COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


def model_config(name: str, max_len: int) -> dict[str, Any]:
    """Contents of a model's config.json that takes sequences of `max_len` tokens."""
    config = dict(MODELS[name])
    config["max_position_embeddings"] = max(config["max_position_embeddings"], max_len)
    return config


def weight_bytes(name: str) -> int:
    """Size of a model's weights in its own dtype; norms left out."""
    c = MODELS[name]
    hidden, heads, kv_heads = (
        c[f] for f in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    attention = 2 * hidden * c["head_dim"] * (heads + kv_heads)
    per_layer = attention + 3 * hidden * c["intermediate_size"]
    total = c["num_hidden_layers"] * per_layer + 2 * c["vocab_size"] * hidden
    return total * _DTYPE_BYTES[c["dtype"]]


def block_bytes(name: str, block_size: int) -> int:
    """Size of one block of stock vLLM's pool: `block_size` tokens' keys and values, all layers."""
    c = MODELS[name]
    per_token = 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"]
    return per_token * _DTYPE_BYTES[c["dtype"]] * block_size


def write_model(folder: Path, name: str, max_len: int) -> Path:
    """Write what a server needs beside dummy weights: config.json and a tokenizer.

    The tokenizer has one word per token id. Prompts are sent as ids; it turns answers into text
    and tells the task classifier what the prompt says, as in any server.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(name, max_len)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    words = {f"w{index}": index for index in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    return folder

"""Random targets with drafters that read their hidden states, small enough for a test.

The target is a random Llama whose first and last norms do nothing but scale. So an EAGLE head that
has all its layers, and takes from its input the embedding alone, is the target itself, one position
behind and without the first token: most of what it drafts is accepted over a whole cache, and a
wrong slot or length in its own cache shows.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from lab.random_models import write_random_model

Weights = dict[str, np.ndarray]


def _write(folder: Path, config: dict[str, Any], weights: Weights) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def _target(folder: Path) -> tuple[dict[str, Any], Weights]:
    write_random_model(folder, "llama")
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    table /= np.sqrt((table**2).mean(axis=1, keepdims=True))
    for name in ("model.layers.0.input_layernorm.weight", "model.norm.weight"):
        weights[name] = np.ones_like(weights[name])
    return config, weights


def write_target_with_eagle(folder: Path) -> tuple[str, str]:
    """The target, and an EAGLE head that is a copy of its layers."""
    config, weights = _target(folder / "target")
    size = config["hidden_size"]
    first_norm = "model.layers.0.input_layernorm.weight"  # an EAGLE head has none
    head = {
        name.removeprefix("model."): weight
        for name, weight in weights.items()
        if name.startswith("model.layers.") and name != first_norm
    }
    head["fc.weight"] = np.eye(size, 2 * size, dtype=np.float32)
    return (
        _write(folder / "target", config, weights),
        _write(folder / "eagle", config, head),
    )


def write_target_with_mtp(folder: Path) -> str:
    """The same target as MiMo, a Qwen2 without biases here, and one random layer that drafts."""
    config, weights = _target(folder / "mtp")
    config |= {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "qwen2",
        "num_nextn_predict_layers": 1,
        "use_sliding_window": False,
    }
    head = "model.mtp_layers.0."
    for name in list(weights):
        parts = name.split(".")
        if parts[-2] in ("q_proj", "k_proj", "v_proj"):
            weights[name.replace("weight", "bias")] = np.zeros(len(weights[name]), np.float32)
    for name in [each for each in weights if each.startswith("model.layers.1.")]:
        weights[head + name.removeprefix("model.layers.1.")] = weights[name]
    size = config["hidden_size"]
    for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        weights[f"{head}{norm}.weight"] = np.ones(size, np.float32)
    weights[f"{head}input_proj.weight"] = np.eye(size, 2 * size, dtype=np.float32)
    return _write(folder / "mtp", config, weights)

"""LoRA adapters of random weights over a model, and the model with one of them in its weights."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import torch
from safetensors.torch import load_file, save_file
from vllm.lora.request import LoRARequest

RANK = 8
ENGINE = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}
"""Arguments of an engine that takes them."""


def two_adapters(model: str, make_folder: Callable[[str], Path]) -> list[LoRARequest]:
    """Strong enough to change what comes out."""
    config = json.loads((Path(model) / "config.json").read_text())
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    sizes = {
        "q_proj": config["num_attention_heads"] * head_dim,
        "v_proj": config["num_key_value_heads"] * head_dim,
    }
    requests = []
    for number in (1, 2):
        folder = make_folder(f"adapter-{number}")
        generator = torch.Generator().manual_seed(number)
        weights = {}
        for layer in range(config["num_hidden_layers"]):
            for name, size in sizes.items():
                start = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_"
                for part, shape in (("A", (RANK, hidden)), ("B", (size, RANK))):
                    weight = torch.randn(*shape, generator=generator) * 0.3
                    weights[f"{start}{part}.weight"] = weight
        save_file(weights, folder / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK}
        settings |= {"target_modules": list(sizes), "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        requests.append(LoRARequest(f"adapter-{number}", number, str(folder)))
    return requests


def merged(model: str, adapter: LoRARequest, folder: Path) -> str:
    """The model with an adapter's weights in its own."""
    copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    parts = load_file(Path(adapter.lora_path) / "adapter_model.safetensors")
    for name in [each for each in parts if ".lora_A." in each]:
        own = name.removeprefix("base_model.model.").replace(".lora_A", "")
        change = parts[name.replace(".lora_A.", ".lora_B.")] @ parts[name]
        weights[own] = (weights[own].float() + change).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)

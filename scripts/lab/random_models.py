"""Tiny models with random weights that are the same on every machine and in every library version.

For comparisons between engines: what is compared is arithmetic, so the weights need no training,
but attention must be peaked and logits must have clear winners, or every comparison would hinge on
rounding. Chance comes from the raw integers of PCG64, a stream that numpy promises to keep (its
distributions may change), and every step from there is exact or correctly rounded.

Only numpy and safetensors are needed. The models have no tokenizer: prompts are token ids, below
`VOCAB_SIZE`; engines skip the tokenizer.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from lab.random_configs import (
    CONFIGS,
    HEAD_DIM,
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    NUM_HEADS,
    VOCAB_SIZE,
)

MODELS = tuple(CONFIGS)

# How much a projection enlarges a vector. Queries and keys: attention logits get a standard
# deviation of 2.25, a handful of tokens share most of the weight. Output: what is attended to,
# and so what is evicted, shows in the logits.
_GAINS = {"q_proj": 1.5, "k_proj": 1.5, "v_proj": 1.0, "o_proj": 2.0, "lm_head": 8.0}
_GAINS |= {"q_b_proj": 1.5, "kv_a_proj_with_mqa": 1.5, "kv_b_proj": 1.5}


def write_random_model(folder: str | Path, name: str, seed: int = 0) -> Path:
    """Write config.json and model.safetensors (float32) of a random model.

    Parameters
    ----------
    folder : str or Path
        Where to; made if it is missing.
    name : str
        "llama": Llama, four query heads per KV head. "qwen3": Qwen3 with norms of queries and
        keys whose weights are not trivial, two query heads per KV head. "gemma3": Gemma 3, every
        other layer with a window of 96 tokens, four query heads per KV head. Likewise "gemma4"
        (heads of its full layers differ in number and size), "gemma2" (with a soft cap), "gpt_oss"
        (learned sinks, YaRN, four experts), "exaone4" and "cohere2" (whose full layers have no
        rotary embedding). "deepseek_v3": DeepSeek V3 with dense layers only, latent attention of
        512 + 64 numbers per token. Likewise "deepseek_v2" (whose queries are not compressed) and
        "glm4_moe_lite" (GLM-4.7-Flash, no YaRN, two experts in its last layer). "smollm3":
        SmolLM3, every other layer without rotary embedding. "olmo2": OLMo 2, norms behind attention
        and MLP, and over all heads of queries and keys at once. "olmo3": the same with windows in
        every other layer. "hunyuan": Hunyuan, which norms queries and keys once they are turned.
        "seed_oss": Seed-OSS, with biases. vLLM has no model class for the last five.
    seed : int, default=0
        Another seed gives other weights.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If there is no model of that name.
    """
    if name not in CONFIGS:
        raise ValueError(f"there is no random model {name!r}; allowed are {', '.join(MODELS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[name]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = _weights(config, seed)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def weights_digest(folder: str | Path) -> str:
    """SHA-256 of a model's weights, whatever the order and the header of the file.

    Parameters
    ----------
    folder : str or Path
        Folder that `write_random_model` wrote.

    Returns
    -------
    str
        Hexadecimal digest of all names, shapes and values.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(load_file(Path(folder) / "model.safetensors").items()):
        digest.update(f"{name} {weight.shape}".encode())
        digest.update(weight.astype("<f4").tobytes())
    return digest.hexdigest()


def distinct_tokens(num_tokens: int, seed: int = 0) -> list[int]:
    """Make a prompt in which no token appears twice, nor a special one.

    In the first layer, two places of one token have keys of equal length and equal values: scores
    would tie there.

    Parameters
    ----------
    num_tokens : int
        Length of the prompt.
    seed : int, default=0
        Another seed gives another prompt.

    Returns
    -------
    list[int]
        Token ids in [2, VOCAB_SIZE).

    Raises
    ------
    ValueError
        If the vocabulary has not that many tokens.
    """
    if not 0 < num_tokens <= VOCAB_SIZE - 2:
        raise ValueError(f"num_tokens must be in [1, {VOCAB_SIZE - 2}], got {num_tokens}")
    raw = np.random.PCG64([seed, zlib.crc32(b"prompt")]).random_raw(VOCAB_SIZE - 2)
    return [int(token) + 2 for token in np.argsort(raw, kind="stable")[:num_tokens]]


def _weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """All weights under Hugging Face's names."""

    def normal(name: str, *shape: int) -> np.ndarray:
        return nearly_normal([seed, zlib.crc32(name.encode())], shape)

    def linear(name: str, num_out: int, num_in: int) -> np.ndarray:
        gain = _GAINS.get(name.split(".")[-2], 1.0)
        return (normal(name, num_out, num_in) * (gain / math.sqrt(num_in))).astype(np.float32)

    def norm(name: str, size: int, mean: float = 1.0) -> np.ndarray:
        weight = mean * (1 + 0.3 * normal(name, size))
        return (weight - is_added).astype(np.float32)

    kind = config["model_type"]
    is_olmo = kind in ("olmo2", "olmo3")
    is_gemma, is_fourth = kind.startswith("gemma"), kind == "gemma4_text"
    is_added = is_gemma and not is_fourth  # norms of Gemma until the third are added to one

    def embedding(name: str, num_tokens: int, size: int) -> np.ndarray:
        # Gemma enlarges embeddings by the root of their size, and they are its output layer, too:
        # layers must outweigh them, or every token would be followed by itself.
        scale = 0.25 / math.sqrt(size) if is_gemma else 0.25 if kind == "cohere2" else 1.0
        return (scale * normal(name, num_tokens, size)).astype(np.float32)

    weights: dict[str, np.ndarray] = {}

    def put(make: Callable[..., np.ndarray], name: str, *arguments: Any) -> None:
        weights[f"{name}.weight"] = make(f"{name}.weight", *arguments)

    put(embedding, "model.embed_tokens", VOCAB_SIZE, HIDDEN_SIZE)
    is_latent = "kv_lora_rank" in config
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        head_dim = _heads(config, index)[0]
        if kind != "exaone4" and not is_olmo:
            put(norm, f"{layer}.input_layernorm", HIDDEN_SIZE)
        for name, num_out, num_in in _latent(config) if is_latent else _plain(config, index):
            put(linear, f"{layer}.self_attn.{name}", num_out, num_in)
        if is_latent:
            if config["q_lora_rank"]:
                put(norm, f"{layer}.self_attn.q_a_layernorm", config["q_lora_rank"])
            put(norm, f"{layer}.self_attn.kv_a_layernorm", config["kv_lora_rank"])
        put(linear, f"{layer}.self_attn.o_proj", HIDDEN_SIZE, NUM_HEADS * head_dim)
        if is_gemma:
            put(norm, f"{layer}.pre_feedforward_layernorm", HIDDEN_SIZE)
        if is_gemma or kind == "exaone4":
            put(norm, f"{layer}.post_feedforward_layernorm", HIDDEN_SIZE)
        if kind in ("gemma3_text", "gemma4_text", "qwen3", "exaone4"):
            # The norms undo the gains of the projections and have to bring them themselves; in
            # Gemma 4 also what dividing by the root of the head's size does elsewhere.
            scale = head_dim**-0.25 if is_fourth else 1.0
            put(norm, f"{layer}.self_attn.q_norm", head_dim, scale * _GAINS["q_proj"])
            put(norm, f"{layer}.self_attn.k_norm", head_dim, scale * _GAINS["k_proj"])
        if kind == "hunyuan_v1_dense":  # behind the rotary embedding
            put(norm, f"{layer}.self_attn.query_layernorm", head_dim, _GAINS["q_proj"])
            put(norm, f"{layer}.self_attn.key_layernorm", head_dim, _GAINS["k_proj"])
        if config["attention_bias"]:
            for name, num_out, _ in _plain(config, index):
                bias = f"{layer}.self_attn.{name}.bias"
                weights[bias] = (0.1 * normal(bias, num_out)).astype(np.float32)
        if is_olmo:
            kv_size = config["num_key_value_heads"] * HEAD_DIM
            put(norm, f"{layer}.self_attn.q_norm", NUM_HEADS * HEAD_DIM, _GAINS["q_proj"])
            put(norm, f"{layer}.self_attn.k_norm", kv_size, _GAINS["k_proj"])
            put(norm, f"{layer}.post_feedforward_layernorm", HIDDEN_SIZE)
        if kind != "cohere2":
            put(norm, f"{layer}.post_attention_layernorm", HIDDEN_SIZE)
        if kind == "gpt_oss":
            weights |= _sinks_and_experts(layer, config, normal)
            continue
        parts = [f"{layer}.mlp"]
        if config.get("mlp_layer_types", ["dense"] * 4)[index] == "sparse":
            put(linear, f"{layer}.mlp.gate", config["n_routed_experts"], HIDDEN_SIZE)
            name = f"{layer}.mlp.gate.e_score_correction_bias"
            weights[name] = np.zeros(config["n_routed_experts"], np.float32)
            names = [f"experts.{number}" for number in range(config["n_routed_experts"])]
            parts = [f"{layer}.mlp.{name}" for name in [*names, "shared_experts"]]
        for part in parts:
            put(linear, f"{part}.gate_proj", INTERMEDIATE_SIZE, HIDDEN_SIZE)
            put(linear, f"{part}.up_proj", INTERMEDIATE_SIZE, HIDDEN_SIZE)
            put(linear, f"{part}.down_proj", HIDDEN_SIZE, INTERMEDIATE_SIZE)
    if config["tie_word_embeddings"]:
        gain = 4 * _GAINS["lm_head"] / (1.0 if is_gemma else math.sqrt(HIDDEN_SIZE))
        put(norm, "model.norm", HIDDEN_SIZE, gain)  # clear winners
    else:
        put(norm, "model.norm", HIDDEN_SIZE)
        put(linear, "lm_head", VOCAB_SIZE, HIDDEN_SIZE)
    return weights


def _heads(config: dict[str, Any], index: int) -> tuple[int, int]:
    """Size and number of a layer's KV heads."""
    if "global_head_dim" in config and config["layer_types"][index] == "full_attention":
        return config["global_head_dim"], config["num_global_key_value_heads"]
    return HEAD_DIM, config["num_key_value_heads"]


def _plain(config: dict[str, Any], index: int) -> list[tuple[str, int, int]]:
    """Projections of queries, keys and values: name, numbers out, numbers in."""
    head_dim, num_heads = _heads(config, index)
    found = [
        ("q_proj", NUM_HEADS * head_dim, HIDDEN_SIZE),
        ("k_proj", num_heads * head_dim, HIDDEN_SIZE),
        ("v_proj", num_heads * head_dim, HIDDEN_SIZE),
    ]
    # In full layers of Gemma 4, keys before their norm are the values.
    return found[:2] if head_dim != HEAD_DIM else found


def _latent(config: dict[str, Any]) -> list[tuple[str, int, int]]:
    """The same of latent attention (MLA)."""
    nope, rope, rank = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["q_lora_rank"]
    query = NUM_HEADS * (nope + rope)
    queries = [("q_a_proj", rank, HIDDEN_SIZE), ("q_b_proj", query, rank)]
    if rank is None:
        queries = [("q_proj", query, HIDDEN_SIZE)]
    return [
        *queries,
        ("kv_a_proj_with_mqa", config["kv_lora_rank"] + rope, HIDDEN_SIZE),
        ("kv_b_proj", NUM_HEADS * (nope + config["v_head_dim"]), config["kv_lora_rank"]),
    ]


def _sinks_and_experts(
    layer: str, config: dict[str, Any], normal: Callable[..., np.ndarray]
) -> dict[str, np.ndarray]:
    """What gpt-oss has in the place of a plain MLP, and beside its attention."""
    num_experts = config["num_local_experts"]
    kv_size = config["num_key_value_heads"] * HEAD_DIM
    attention, experts = f"{layer}.self_attn", f"{layer}.mlp.experts"
    down = (num_experts, INTERMEDIATE_SIZE, HIDDEN_SIZE)
    shapes = {
        f"{attention}.sinks": ((NUM_HEADS,), 2.0),
        f"{attention}.q_proj.bias": ((NUM_HEADS * HEAD_DIM,), 0.1),
        f"{attention}.k_proj.bias": ((kv_size,), 0.1),
        f"{attention}.v_proj.bias": ((kv_size,), 0.1),
        f"{attention}.o_proj.bias": ((HIDDEN_SIZE,), 0.1),
        f"{layer}.mlp.router.weight": ((num_experts, HIDDEN_SIZE), 1 / math.sqrt(HIDDEN_SIZE)),
        f"{layer}.mlp.router.bias": ((num_experts,), 0.1),
        f"{experts}.gate_up_proj": (
            (num_experts, HIDDEN_SIZE, 2 * INTERMEDIATE_SIZE),
            1 / math.sqrt(HIDDEN_SIZE),
        ),
        f"{experts}.gate_up_proj_bias": ((num_experts, 2 * INTERMEDIATE_SIZE), 0.1),
        f"{experts}.down_proj": (down, 1 / math.sqrt(INTERMEDIATE_SIZE)),
        f"{experts}.down_proj_bias": ((num_experts, HIDDEN_SIZE), 0.1),
    }
    return {
        name: (scale * normal(name, *shape)).astype(np.float32)
        for name, (shape, scale) in shapes.items()
    }


def nearly_normal(seed: list[int], shape: tuple[int, ...]) -> np.ndarray:
    """Nearly normal float64 values of mean 0 and variance 1: sums of four uniform integers."""
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    quarters = np.stack([raw >> np.uint64(shift) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48)])
    sums = quarters.astype(np.int64).sum(axis=0) - 2 * 0xFFFF
    return (sums / math.sqrt(((1 << 32) - 1) / 3)).reshape(shape)

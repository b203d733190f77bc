"""Tiny random models with recurrent layers beside attention, as `random_models` has others.

Every other layer has a state of fixed size in the place of keys and values, the others attend to
everything.
"""

import json
import math
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lab.random_models import HEAD_DIM, HIDDEN_SIZE, INTERMEDIATE_SIZE, VOCAB_SIZE, nearly_normal

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS = 4, 8, 2
CONV_WIDTH = 3
"""Tokens that a short convolution sees."""
MAMBA_HEADS, MAMBA_HEAD_DIM, STATE_SIZE, MAMBA_CONV = 16, 32, 16, 4
LINEAR_HEAD_DIM, LINEAR_KEY_HEADS, LINEAR_VALUE_HEADS = 128, 1, 2  # vLLM's kernels take these
_INNER = MAMBA_HEADS * MAMBA_HEAD_DIM
_CONV_SIZE = _INNER + 2 * STATE_SIZE

_COMMON = {
    "bos_token_id": 0,
    "dtype": "float32",
    "eos_token_id": 1,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": INTERMEDIATE_SIZE,
    "max_position_embeddings": 4096,
    "num_attention_heads": NUM_HEADS,
    "num_hidden_layers": NUM_LAYERS,
    "num_key_value_heads": NUM_KV_HEADS,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "lfm2": {
        **_COMMON,
        "architectures": ["Lfm2ForCausalLM"],
        "block_auto_adjust_ff_dim": False,
        "block_dim": HIDDEN_SIZE,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 32,
        "conv_L_cache": CONV_WIDTH,
        "conv_bias": False,
        "conv_dim": HIDDEN_SIZE,
        "layer_types": ["conv", "full_attention"] * 2,
        "model_type": "lfm2",
        "norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    },
    "granite4": {
        **_COMMON,
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "attention_bias": False,
        "attention_multiplier": HEAD_DIM**-0.5,
        "embedding_multiplier": 1.0,
        "hidden_act": "silu",
        # As in IBM's files; transformers has other words for it by now.
        "layer_types": ["mamba", "attention"] * 2,
        "logits_scaling": 1.0,
        "mamba_chunk_size": 64,
        "mamba_conv_bias": True,
        "mamba_d_conv": MAMBA_CONV,
        "mamba_d_head": MAMBA_HEAD_DIM,
        "mamba_d_state": STATE_SIZE,
        "mamba_expand": _INNER // HIDDEN_SIZE,
        "mamba_n_groups": 1,
        "mamba_n_heads": MAMBA_HEADS,
        "mamba_proj_bias": False,
        "model_type": "granitemoehybrid",
        "num_experts_per_tok": 0,
        "num_local_experts": 0,
        "position_embedding_type": "nope",
        "residual_multiplier": 1.0,
        "rms_norm_eps": 1e-6,
        "shared_intermediate_size": INTERMEDIATE_SIZE,
    },
}
_GATED: dict[str, Any] = {
    **_COMMON,
    "attention_bias": False,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_conv_kernel_dim": MAMBA_CONV,
    "linear_key_head_dim": LINEAR_HEAD_DIM,
    "linear_num_key_heads": LINEAR_KEY_HEADS,
    "linear_num_value_heads": LINEAR_VALUE_HEADS,
    "linear_value_head_dim": LINEAR_HEAD_DIM,
    "num_key_value_heads": NUM_HEADS,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000.0,
        "rope_type": "default",
    },
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": INTERMEDIATE_SIZE,
    # All are chosen: which of them would hinge on rounding.
    "num_experts": 2,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": INTERMEDIATE_SIZE,
}
_CONFIGS["qwen3_next"] = {
    **_GATED,
    **_EXPERTS,
    "architectures": ["Qwen3NextForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "norm_topk_prob": True,
    "partial_rotary_factor": 0.25,
}
_M_ROPE = {"mrope_interleaved": True, "mrope_section": [2, 1, 1]}
_CONFIGS["qwen3_5"] = {
    **_GATED,
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "rope_parameters": {**_GATED["rope_parameters"], **_M_ROPE},
}
_CONFIGS["qwen3_5_moe"] = {
    **_CONFIGS["qwen3_5"],
    **_EXPERTS,
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
}
_CONFIGS["nemotron_h"] = {
    **_COMMON,
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "chunk_size": 64,
    "conv_kernel": MAMBA_CONV,
    "expand": _INNER // HIDDEN_SIZE,
    "head_dim": HEAD_DIM,
    # Layers of every kind: Mamba, feed-forward, attention.
    "hybrid_override_pattern": "M-*M-*",
    "layer_norm_epsilon": 1e-6,
    "mamba_head_dim": MAMBA_HEAD_DIM,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": MAMBA_HEADS,
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "n_groups": 1,
    "num_hidden_layers": 6,
    "ssm_state_size": STATE_SIZE,
    # transformers takes no shorter steps than this, vLLM any.
    "time_step_min": 1e-30,
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_conv_bias": True,
}
HYBRIDS = tuple(_CONFIGS)


def write_random_hybrid(folder: str | Path, name: str, seed: int = 0) -> Path:
    """Write config.json and model.safetensors (float32) of a random model.

    Parameters
    ----------
    folder : str or Path
        Where to; made if it is missing.
    name : {"lfm2", "granite4", "qwen3_next", "qwen3_5", "qwen3_5_moe", "nemotron_h"}
        "lfm2": LFM2, short convolutions, rotary embeddings. "granite4": Granite 4 without experts,
        Mamba 2, no rotary embeddings. "qwen3_next": Qwen3-Next, gated delta rule, a quarter of
        each head is rotated. "qwen3_5", "qwen3_5_moe": the text part of Qwen3.5, like it,
        without experts and with them. "nemotron_h": Nemotron-H, Mamba 2, feed-forward layers of
        their own.
    seed : int, default=0
        Another seed gives other weights.

    Returns
    -------
    Path
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_CONFIGS[name], indent=2) + "\n")
    weights: dict[str, np.ndarray] = {}
    maker = _Maker(seed, weights)
    _BUILDERS[name](maker)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class _Maker:
    """Makes weights whose values depend on their names alone."""

    def __init__(self, seed: int, weights: dict[str, np.ndarray]) -> None:
        self.seed, self.weights = seed, weights

    def put(self, name: str, *shape: int, scale: float = 1.0, mean: float = 0.0) -> None:
        values = nearly_normal([self.seed, zlib.crc32(name.encode())], shape)
        self.weights[name] = (mean + scale * values).astype(np.float32)

    def linear(self, name: str, num_out: int, num_in: int, gain: float = 1.0) -> None:
        self.put(f"{name}.weight", num_out, num_in, scale=gain / math.sqrt(num_in))

    def norm(self, name: str, size: int, mean: float = 1.0) -> None:
        self.put(f"{name}.weight", size, scale=0.3 * mean, mean=mean)

    def tied_embedding(self, name: str) -> None:
        # The output layer, too: layers must outweigh it, or every token would follow itself.
        self.put(f"{name}.weight", VOCAB_SIZE, HIDDEN_SIZE, scale=0.25 / math.sqrt(HIDDEN_SIZE))

    def attention(
        self, layer: str, output: str, num_kv_heads: int = NUM_KV_HEADS, is_gated: bool = False
    ) -> None:
        kv_size, times = num_kv_heads * HEAD_DIM, 2 if is_gated else 1
        self.linear(f"{layer}.q_proj", times * HIDDEN_SIZE, HIDDEN_SIZE, 1.5)
        self.linear(f"{layer}.k_proj", kv_size, HIDDEN_SIZE, 1.5)
        self.linear(f"{layer}.v_proj", kv_size, HIDDEN_SIZE)
        # A gate lets half of it through.
        self.linear(f"{layer}.{output}", HIDDEN_SIZE, HIDDEN_SIZE, 2.0 * times)


def _lfm2(make: _Maker) -> None:
    make.tied_embedding("model.embed_tokens")
    for index in range(NUM_LAYERS):
        layer = f"model.layers.{index}"
        if index % 2:
            make.attention(f"{layer}.self_attn", "out_proj")
            make.norm(f"{layer}.self_attn.q_layernorm", HEAD_DIM, 1.5)
            make.norm(f"{layer}.self_attn.k_layernorm", HEAD_DIM, 1.5)
        else:
            make.linear(f"{layer}.conv.in_proj", 3 * HIDDEN_SIZE, HIDDEN_SIZE)
            make.put(f"{layer}.conv.conv.weight", HIDDEN_SIZE, 1, CONV_WIDTH, scale=0.6)
            make.linear(f"{layer}.conv.out_proj", HIDDEN_SIZE, HIDDEN_SIZE)
        make.norm(f"{layer}.operator_norm", HIDDEN_SIZE)
        make.norm(f"{layer}.ffn_norm", HIDDEN_SIZE)
        make.linear(f"{layer}.feed_forward.w1", INTERMEDIATE_SIZE, HIDDEN_SIZE)
        make.linear(f"{layer}.feed_forward.w3", INTERMEDIATE_SIZE, HIDDEN_SIZE)
        make.linear(f"{layer}.feed_forward.w2", HIDDEN_SIZE, INTERMEDIATE_SIZE)
    make.norm("model.embedding_norm", HIDDEN_SIZE, 32.0)


def _granite4(make: _Maker) -> None:
    make.tied_embedding("model.embed_tokens")
    for index in range(NUM_LAYERS):
        layer = f"model.layers.{index}"
        if index % 2:
            make.attention(f"{layer}.self_attn", "o_proj")
        else:
            _mamba(make, f"{layer}.mamba")
        make.norm(f"{layer}.input_layernorm", HIDDEN_SIZE)
        make.norm(f"{layer}.post_attention_layernorm", HIDDEN_SIZE)
        make.linear(f"{layer}.shared_mlp.input_linear", 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE)
        make.linear(f"{layer}.shared_mlp.output_linear", HIDDEN_SIZE, INTERMEDIATE_SIZE)
    make.norm("model.norm", HIDDEN_SIZE, 32.0)


def _mamba(make: _Maker, layer: str) -> None:
    # Decays from a few tokens to hundreds, as trained heads have them.
    steps = np.exp(np.linspace(math.log(1e-3), math.log(1e-1), MAMBA_HEADS))
    make.weights[f"{layer}.dt_bias"] = np.log(np.expm1(steps)).astype(np.float32)
    rates = np.log(np.arange(1, MAMBA_HEADS + 1))
    make.weights[f"{layer}.A_log"] = rates.astype(np.float32)
    make.put(f"{layer}.D", MAMBA_HEADS, scale=0.3, mean=1.0)
    make.put(f"{layer}.conv1d.weight", _CONV_SIZE, 1, MAMBA_CONV, scale=0.5)
    make.put(f"{layer}.conv1d.bias", _CONV_SIZE, scale=0.1)
    make.linear(f"{layer}.in_proj", _INNER + _CONV_SIZE + MAMBA_HEADS, HIDDEN_SIZE)
    make.norm(f"{layer}.norm", _INNER)
    make.linear(f"{layer}.out_proj", HIDDEN_SIZE, _INNER)


def _gated(make: _Maker, name: str) -> None:
    make.put("model.embed_tokens.weight", VOCAB_SIZE, HIDDEN_SIZE)
    for index in range(NUM_LAYERS):
        layer = f"model.layers.{index}"
        if index % 2:
            _gated_attention(make, f"{layer}.self_attn")
        else:
            _delta_rule(make, f"{layer}.linear_attn", is_split=name != "qwen3_next")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            make.put(f"{layer}.{norm}.weight", HIDDEN_SIZE, scale=0.3)
        if name == "qwen3_5":
            _mlp(make, f"{layer}.mlp")
            continue
        make.linear(f"{layer}.mlp.gate", 2, HIDDEN_SIZE)
        make.linear(f"{layer}.mlp.shared_expert_gate", 1, HIDDEN_SIZE)
        _mlp(make, f"{layer}.mlp.shared_expert")
        if name == "qwen3_next":
            for number in range(2):
                _mlp(make, f"{layer}.mlp.experts.{number}")
        else:
            sizes = 2, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE
            make.put(f"{layer}.mlp.experts.gate_up_proj", *sizes, scale=HIDDEN_SIZE**-0.5)
            sizes = 2, HIDDEN_SIZE, INTERMEDIATE_SIZE
            make.put(f"{layer}.mlp.experts.down_proj", *sizes, scale=INTERMEDIATE_SIZE**-0.5)
    make.put("model.norm.weight", HIDDEN_SIZE, scale=0.3)
    make.linear("lm_head", VOCAB_SIZE, HIDDEN_SIZE, 8.0)


def _gated_attention(make: _Maker, layer: str) -> None:
    # Norms of this family are added to one.
    make.attention(layer, "o_proj", NUM_HEADS, is_gated=True)
    make.put(f"{layer}.q_norm.weight", HEAD_DIM, scale=0.4, mean=0.5)
    make.put(f"{layer}.k_norm.weight", HEAD_DIM, scale=0.4, mean=0.5)


def _mlp(make: _Maker, layer: str) -> None:
    for part in ("gate_proj", "up_proj"):
        make.linear(f"{layer}.{part}", INTERMEDIATE_SIZE, HIDDEN_SIZE)
    make.linear(f"{layer}.down_proj", HIDDEN_SIZE, INTERMEDIATE_SIZE)


def _delta_rule(make: _Maker, layer: str, is_split: bool = False) -> None:
    size = LINEAR_VALUE_HEADS * LINEAR_HEAD_DIM
    inputs = 2 * LINEAR_KEY_HEADS * LINEAR_HEAD_DIM + 2 * size
    rates = np.log(np.linspace(0.01, 0.05, LINEAR_VALUE_HEADS))
    make.weights[f"{layer}.A_log"] = rates.astype(np.float32)
    make.weights[f"{layer}.dt_bias"] = np.zeros(LINEAR_VALUE_HEADS, np.float32)
    make.put(f"{layer}.conv1d.weight", inputs - size, 1, MAMBA_CONV, scale=0.5)
    if is_split:
        make.linear(f"{layer}.in_proj_qkv", inputs - size, HIDDEN_SIZE)
        make.linear(f"{layer}.in_proj_z", size, HIDDEN_SIZE)
        for name in ("in_proj_b", "in_proj_a"):
            make.linear(f"{layer}.{name}", LINEAR_VALUE_HEADS, HIDDEN_SIZE)
    else:
        make.linear(f"{layer}.in_proj_qkvz", inputs, HIDDEN_SIZE)
        make.linear(f"{layer}.in_proj_ba", 2 * LINEAR_VALUE_HEADS, HIDDEN_SIZE)
    make.norm(f"{layer}.norm", LINEAR_HEAD_DIM)
    make.linear(f"{layer}.out_proj", HIDDEN_SIZE, size)


def _nemotron_h(make: _Maker) -> None:
    make.put("model.embeddings.weight", VOCAB_SIZE, HIDDEN_SIZE)
    for index, kind in enumerate(_CONFIGS["nemotron_h"]["hybrid_override_pattern"]):
        layer = f"model.layers.{index}"
        make.norm(f"{layer}.norm", HIDDEN_SIZE)
        if kind == "M":
            _mamba(make, f"{layer}.mixer")
        elif kind == "*":
            make.attention(f"{layer}.mixer", "o_proj")
        else:
            make.linear(f"{layer}.mixer.up_proj", INTERMEDIATE_SIZE, HIDDEN_SIZE)
            make.linear(f"{layer}.mixer.down_proj", HIDDEN_SIZE, INTERMEDIATE_SIZE)
    make.norm("model.norm_f", HIDDEN_SIZE)
    make.linear("lm_head", VOCAB_SIZE, HIDDEN_SIZE, 8.0)


_BUILDERS: dict[str, Callable[[_Maker], None]] = {
    "lfm2": _lfm2,
    "granite4": _granite4,
    "qwen3_next": partial(_gated, name="qwen3_next"),
    "qwen3_5": partial(_gated, name="qwen3_5"),
    "qwen3_5_moe": partial(_gated, name="qwen3_5_moe"),
    "nemotron_h": _nemotron_h,
}

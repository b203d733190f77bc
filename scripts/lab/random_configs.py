"""Configurations of the random models, as Hugging Face has them; their sizes."""

from typing import Any

VOCAB_SIZE = 1536
HIDDEN_SIZE = 256
HEAD_DIM = 32  # the smallest that vLLM's attention on CPU takes
NUM_HEADS = 8
INTERMEDIATE_SIZE = 512

COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dtype": "float32",
    "eos_token_id": 1,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": INTERMEDIATE_SIZE,
    "max_position_embeddings": 4096,
    "num_attention_heads": NUM_HEADS,
    "num_hidden_layers": 4,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        **COMMON,
        "architectures": ["LlamaForCausalLM"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_key_value_heads": 2,
    },
    "qwen3": {
        **COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_key_value_heads": 4,
        "use_sliding_window": False,
    },
    "gemma3": {
        **COMMON,
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "model_type": "gemma3_text",
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": HEAD_DIM,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1000000.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 96,
        "tie_word_embeddings": True,
    },
    # Full layers have larger heads, fewer of them for keys, and no projection of their values.
    "gemma4": {
        **COMMON,
        "architectures": ["Gemma4ForCausalLM"],
        "attention_k_eq_v": True,
        "global_head_dim": 2 * HEAD_DIM,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "model_type": "gemma4_text",
        "num_global_key_value_heads": 1,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 0,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 96,
        "tie_word_embeddings": True,
        "vocab_size_per_layer_input": VOCAB_SIZE,
    },
    "gemma2": {
        **COMMON,
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "model_type": "gemma2",
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": HEAD_DIM,
        "sliding_window": 96,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {
        **COMMON,
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "model_type": "gpt_oss",
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 512,
            "rope_theta": 150000.0,
            "rope_type": "yarn",
            "truncate": False,
        },
        "sliding_window": 96,
    },
    "exaone4": {
        **COMMON,
        "architectures": ["Exaone4ForCausalLM"],
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "model_type": "exaone4",
        "num_key_value_heads": 2,
        "sliding_window": 96,
        "sliding_window_pattern": None,
    },
    "cohere2": {
        **COMMON,
        "architectures": ["Cohere2ForCausalLM"],
        "layer_norm_eps": 1e-5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "logit_scale": 1.0,
        "model_type": "cohere2",
        "num_key_value_heads": 2,
        "sliding_window": 96,
        "tie_word_embeddings": True,
    },
    "deepseek_v3": {
        **{key: value for key, value in COMMON.items() if key != "head_dim"},
        "architectures": ["DeepseekV3ForCausalLM"],
        "first_k_dense_replace": 4,  # no layer has experts
        "kv_lora_rank": 512,  # with a rotated part of 64 the one that vLLM's CPU kernels take
        "model_type": "deepseek_v3",
        "n_group": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": NUM_HEADS,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 96,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        # As DeepSeek's. Another reason: vLLM's CPU kernel for plain ones wants whole heads.
        "rope_parameters": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 1024,
            "rope_theta": 10000.0,
            "rope_type": "yarn",
        },
        "topk_group": 1,
        "v_head_dim": 32,
    },
    "smollm3": {
        **COMMON,
        "architectures": ["SmolLM3ForCausalLM"],
        "layer_types": ["full_attention"] * 4,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layers": [1, 0, 1, 0],
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "use_sliding_window": False,
    },
    "olmo2": {
        **COMMON,
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "num_key_value_heads": 4,
        "pad_token_id": 0,
    },
}
CONFIGS["olmo3"] = {
    **CONFIGS["olmo2"],
    "architectures": ["Olmo3ForCausalLM"],
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "model_type": "olmo3",
    "sliding_window": 96,
}
CONFIGS["hunyuan"] = {
    **COMMON,
    "architectures": ["HunYuanDenseV1ForCausalLM"],
    "model_type": "hunyuan_v1_dense",
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}
CONFIGS["seed_oss"] = {
    **COMMON,
    "architectures": ["SeedOssForCausalLM"],
    "attention_bias": True,
    "attention_out_bias": False,
    "mlp_bias": False,
    "model_type": "seed_oss",
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "residual_dropout": 0.0,
}
CONFIGS["deepseek_v2"] = {
    **CONFIGS["deepseek_v3"],
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "n_shared_experts": 1,
    "q_lora_rank": None,  # as in V2 Lite
    "topk_method": "greedy",
}
CONFIGS["glm4_moe_lite"] = {
    **CONFIGS["deepseek_v3"],
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "first_k_dense_replace": 3,  # vLLM wants a layer with experts
    "mlp_layer_types": ["dense"] * 3 + ["sparse"],
    "model_type": "glm4_moe_lite",
    "moe_intermediate_size": INTERMEDIATE_SIZE,
    "n_routed_experts": 2,  # both are chosen: which of them would hinge on rounding
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}

"""Model families: rows of docs/compatibility.md.

Configurations are the lines of published config.json files that the checks look at, without sizes.
"""

from lab.compatibility.rows import SIZES, StandIn, llama, model, options, refused, works

HALF_WINDOWED = ["sliding_attention", "full_attention"] * 2
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 1024}  # fmt: skip

FAMILIES = (
    works(
        "Full attention: Llama 3.x, SmolLM2, Mistral 7B v0.3, Phi-4, Granite 3",
        "all policies, codebooks, drafts",
        "tests/e2e/test_kvpress_parity.py::test_method",
        "tests/e2e/test_oracle.py::test_tokens_equal_those_of_a_pruned_cache",
        "tests/evaluation/test_real_model.py::test_a_cell_of_the_real_table",
        given=llama(),
    ),
    works(
        "Full attention with norms of queries and keys: Qwen3, Qwen3-MoE",
        "the same; experts change nothing in attention",
        "tests/e2e/test_kvpress_parity.py::test_method",
        given=model("Qwen3ForCausalLM", "qwen3"),
    ),
    works(
        "Partly rotated heads: GLM-4, Phi, MiniMax-M2",
        "the same; vLLM's modules and transformers' agree on what is turned",
        "tests/host/test_attention_probe.py::test_rotary_embeddings_and_projections_are_found",
        "tests/worker/compaction/test_layer_parts.py::"
        "test_vllms_modules_and_transformers_turn_alike",
        given=model("Glm4ForCausalLM", "glm4", partial_rotary_factor=0.5),
    ),
    works(
        "vLLM's Transformers backend: OLMo 2, Hunyuan dense, Seed-OSS, any with "
        "`--model-impl transformers`",
        "all policies and codebooks whose parts are found in the layers; others are refused by "
        "name, at start-up and per request",
        "tests/e2e/test_transformers_backend.py::test_olmo2_with_two_layer_groups_and_a_codebook",
        "tests/e2e/test_transformers_backend.py::test_others_with_two_layer_groups",
        "tests/host/test_part_checks.py::test_the_others_are_named",
        given=model("Olmo2ForCausalLM", "olmo2"),
    ),
    refused(
        "the same, where keys are normed once they are turned (Hunyuan), with a policy that turns",
        "policy.name: expected_attention turns keys or queries by whole positions, and how layers "
        "turn them in MODEL on vLLM's Transformers backend is not known; choose one of the presets "
        "adakv, auto, cake, chunkkv, criticalkv, h2o, keydiff, knorm, lagkv, pyramidkv, random, "
        "rkv, shared_prefix, snapkv, spindlekv-evict, streaming_llm, tova, windowkv, "
        "windowkv_llama3, windowkv_qwen2.5.",
        StandIn(
            model={
                **SIZES,
                "architectures": ["HunYuanDenseV1ForCausalLM"],
                "model_type": "hunyuan_v1_dense",
            },
            setting="expected_attention",
        ),
    ),
    works(
        "the same with windowed layers: OLMo 3",
        "the full layers are compacted, as in Gemma 3",
        "tests/e2e/test_transformers_backend.py::test_olmo3_whose_other_layers_have_windows",
        given=model("Olmo3ForCausalLM", "olmo3", sliding_window=96, layer_types=HALF_WINDOWED),
    ),
    works(
        "Layers without rotary embedding (NoPE): SmolLM3",
        "all policies but those that turn keys alike in all layers; expected attention turns "
        "queries where the layer does",
        "tests/e2e/test_transformers_backend.py::test_engine_and_transformers_agree",
        "tests/e2e/test_transformers_backend.py::test_presets_that_a_request_names",
        given=model("SmolLM3ForCausalLM", "smollm3", no_rope_layers=[1, 1, 1, 0]),
    ),
    refused(
        "the same, with a codebook or re-rotation",
        "policy.name: spindlekv turns keys by whole positions, alike in all layers, and "
        "some layers of MODEL have no rotary embedding; choose one of the presets adakv, "
        "auto, cake, chunkkv, criticalkv, expected_attention, h2o, keydiff, knorm, lagkv,"
        " pyramidkv, random, rkv, shared_prefix, snapkv, spindlekv-evict, streaming_llm, tova,"
        " windowkv, windowkv_llama3, windowkv_qwen2.5.",
        StandIn(
            model={
                **SIZES,
                "architectures": ["SmolLM3ForCausalLM"],
                "model_type": "smollm3",
                "no_rope_layers": [1, 1, 1, 0],
            },
            setting="spindlekv",
        ),
    ),
    refused(
        "Rotary embedding scaled by length (YaRN, dynamic NTK), with a policy that turns",
        "policy.name: expected_attention turns keys or queries by whole positions, and "
        "MODEL scales its rotary embedding; choose another policy.",
        StandIn(
            model={
                **SIZES,
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "rope_parameters": YARN,
            },
            setting="expected_attention",
        ),
    ),
    works(
        "the same, with any other policy",
        "scores do not ask how keys were turned",
        "tests/host/test_checks.py::test_settings_that_do_not_fit_the_model",
        given=llama(rope_parameters=YARN),
    ),
    works(
        "Windowed beside full layers: Gemma 3",
        "full layers are compacted, windowed ones are vLLM's own; no drafts",
        "tests/e2e/test_windowed_layers.py::test_the_full_layers_alone_are_compacted",
        "tests/e2e/test_windowed_layers.py::"
        "test_a_hit_that_ends_inside_the_window_gives_the_tokens_of_a_cold_run",
        given=model(
            "Gemma3ForCausalLM", "gemma3_text", sliding_window=96, layer_types=HALF_WINDOWED
        ),
    ),
    refused(
        "the same, in draft mode",
        "mode: MODEL has windowed layers, over which drafts have not been tried; leave "
        "out draft mode and draft.budget.",
        StandIn(
            model={
                **SIZES,
                "architectures": ["Gemma3ForCausalLM"],
                "model_type": "gemma3_text",
                "sliding_window": 96,
                "layer_types": HALF_WINDOWED,
            },
            setting={"preset": "snapkv", "mode": "draft"},
        ),
    ),
    refused(
        "Windows in all layers: Mistral 7B v0.1",
        "all layers of MODEL are sliding-window layers of 128 tokens, whose cache is "
        "bounded already: choose a model with layers that attend to everything",
        model("MistralForCausalLM", "mistral", sliding_window=128),
    ),
    refused(
        "Chunked attention: Llama 4's text model",
        "MODEL has layers of the kind chunked_attention: choose a model whose layers "
        "attend to everything or to a window, or have a recurrent state",
        llama(layer_types=["chunked_attention", "full_attention"] * 2),
    ),
    works(
        "Soft caps of logits: Gemma 2; full layers without rotary embedding: EXAONE 4",
        "as Gemma 3; the cap enters scores and codebooks",
        "tests/e2e/test_windowed_models.py::test_policies",
        "tests/worker/test_layer_patterns.py::test_windows_are_where_the_configuration_says",
        given=model("Gemma2ForCausalLM", "gemma2", sliding_window=96, attn_logit_softcapping=50.0),
    ),
    works(
        "Heads of full layers that differ in number and size: Gemma 4 (26B, 31B), text",
        "as Gemma 3, but policies that turn keys (its rotary embedding is scaled)",
        "tests/e2e/test_windowed_models.py::test_policies",
        given=model(
            "Gemma4ForCausalLM",
            "gemma4_text",
            sliding_window=96,
            layer_types=HALF_WINDOWED,
            global_head_dim=64,
            hidden_size_per_layer_input=0,
        ),
    ),
    works(
        "Learned sinks: gpt-oss",
        "policies that turn no keys (its rotary embedding is scaled); a sink is no token",
        "tests/e2e/test_windowed_models.py::test_policies",
        given=model(
            "GptOssForCausalLM",
            "gpt_oss",
            sliding_window=96,
            layer_types=HALF_WINDOWED,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters=YARN,
        ),
    ),
    works(
        "A window above the longest sequence: Phi-4-mini",
        "all layers are full in effect",
        "tests/worker/test_layer_patterns.py::test_windows_are_where_the_configuration_says",
        given=llama(sliding_window=262144),
    ),
    works(
        "Recurrent beside full layers: Granite 4, LFM2, Qwen3-Next, Qwen3.5, Nemotron-H",
        "layers with attention are compacted, states are vLLM's own; no drafts. Nemotron-H and "
        "Qwen3.5 with experts: `scripts/hybrid_tokens.py`, by hand",
        "tests/e2e/test_linear_layers.py::test_attention_alone_is_compacted",
        "tests/e2e/test_linear_layers.py::test_short_convolutions_two_layer_groups_and_decoding",
        "tests/e2e/test_linear_layers.py::test_the_delta_rule",
    ),
    works(
        "Multi-head latent attention (MLA): DeepSeek V2 and V3, Kimi K2, GLM-4.7-Flash",
        "scores of the window and of cached rows; no drafts, codebooks, fp8. Kimi K2 has the class "
        "of DeepSeek V3",
        "tests/e2e/test_latent_attention.py::test_other_policies",
        "tests/e2e/test_latent_attention.py::test_other_families_with_two_layer_groups",
        "tests/e2e/test_latent_ranks.py::test_two_ranks_keep_what_all_heads_attend_to",
        "tests/host/test_latent_checks.py::test_what_is_not_served",
    ),
    works(
        "Images, with M-RoPE: PaddleOCR-VL; Qwen2.5-VL, Qwen3-VL and Qwen3.5 where torchvision is "
        "installed",
        "policies and settings that turn no keys; tokens of images are tokens",
        "tests/e2e/test_multimodal.py::TestWithSeveralPositions::test_compressed_with_a_cold_cache_and_a_warm_one",
        "tests/e2e/test_multimodal.py::test_families_with_torchvision",
        "tests/e2e/test_image_over_http.py::test_a_chat_with_an_image",
    ),
    works(
        "Videos, with M-RoPE: Qwen2.5-VL where torchvision is installed",
        "tokens of videos are tokens; videos of other models were not run, and no check refuses "
        "them",
        "tests/e2e/test_multimodal.py::test_families_with_torchvision",
    ),
    works(
        "Images beside windowed layers: Gemma 3 and 4, multimodal, where torchvision is installed",
        "as their text models",
        "tests/e2e/test_multimodal.py::TestWithWindowedLayers::test_images",
        "tests/e2e/test_multimodal.py::test_families_with_torchvision",
    ),
    works(
        "Images of Pixtral's tower: Mistral 3, where torchvision is installed",
        "tokens of images and the ends of their rows are tokens; no policy is refused, SnapKV's "
        "scores with two layer groups and n-gram drafts were run",
        "tests/e2e/test_multimodal.py::test_families_with_torchvision",
    ),
    works(
        "Images of CLIP's tower: LLaVA 1.5, where torchvision is installed",
        "as Mistral 3",
        "tests/e2e/test_multimodal.py::test_families_with_torchvision",
    ),
    refused(
        "ALiBi: BLOOM, MPT",
        "layer LAYER uses ALiBi, which needs every key at its own index: choose a model with RoPE",
        StandIn(layer={"alibi_slopes": [0.5]}),
    ),
    refused(
        "Layers that share a cache: Gemma 3n, Gemma 4 E2B and E4B",
        "layer LAYER shares the KV cache of another layer: choose a model without KV sharing",
        StandIn(layer={"kv_sharing_target_layer_name": "another"}),
    ),
    refused(
        "Without attention: Mamba",
        "MODEL is an attention-free model: choose a decoder-only text model",
        model("MambaForCausalLM", "mamba"),
    ),
    refused(
        "Encoder-decoder: Whisper, BART",
        "MODEL is an encoder-decoder model: choose a decoder-only text model",
        options("model_config", is_encoder_decoder=True, model="MODEL"),
    ),
    refused(
        "Diffusion",
        "MODEL is a diffusion model: choose a decoder-only text model",
        options("model_config", is_diffusion=True, model="MODEL"),
    ),
    refused(
        "Pooling models",
        "only text generation has a cache to compress: remove --runner pooling",
        options("model_config", runner_type="pooling"),
    ),
)

"""Heads that read the target's hidden states: which are tried beside an evicted cache.

Draft models are in test_checks.py, with vLLM's own configuration.
"""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_kvcompress.host.speculation_checks import HEADS, speculation


def model(num_layers: int = 2, window: int | None = None, **kinds: bool) -> SimpleNamespace:
    names = ("is_encoder_decoder", "use_mla", "is_hybrid", "is_attention_free")
    names += ("is_multimodal_model", "is_diffusion", "supports_multimodal_inputs")
    return SimpleNamespace(
        model="MODEL",
        max_model_len=1024,
        hf_text_config=SimpleNamespace(num_hidden_layers=num_layers, sliding_window=window),
        **(dict.fromkeys(names, False) | kinds),
    )


def config(method: str, target: Any = None, **changes: Any) -> SimpleNamespace:
    speculative = {
        "method": method,
        "draft_model_config": model(0 if method == "mtp" else 1),
        "kv_cache_dtype": None,
        "draft_tensor_parallel_size": None,
        "enable_adaptive_verification": False,
        "use_gemma4_mtp": lambda: False,
        "use_multi_module_mtp": lambda: False,
    }
    return SimpleNamespace(
        model_config=target or model(),
        speculative_config=SimpleNamespace(**speculative | changes),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        quant_config=None,
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )


@pytest.mark.parametrize("method", HEADS)
def test_heads_are_welcome(method: str) -> None:
    assert speculation(config(method)) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (config("eagle", draft_model_config=model(use_mla=True)), "the head MODEL is a model with"),
        (config("eagle3", draft_model_config=model(1, window=64)), "the head MODEL has sliding"),
        (config("eagle", kv_cache_dtype="fp8"), "remove kv_cache_dtype"),
        (config("eagle", enable_adaptive_verification=True), "enable_adaptive_verification"),
        (config("mtp", draft_tensor_parallel_size=2), "remove draft_tensor_parallel_size"),
        (config("mtp", use_gemma4_mtp=lambda: True), "heads that read the target's cache"),
        (config("mtp", use_multi_module_mtp=lambda: True), "several heads in turn"),
    ],
)
def test_heads_that_do_not_fit(given: Any, words: str) -> None:
    reason = speculation(given)
    assert reason is not None and reason.startswith("--speculative-config: ") and words in reason


@pytest.mark.parametrize("method", HEADS)
def test_heads_beside_windowed_layers_are_refused(method: str) -> None:
    target = model(2)
    target.hf_text_config.layer_types = ["sliding_attention", "full_attention"]
    target.hf_text_config.sliding_window = 64
    reason = speculation(config(method, target))
    assert reason is not None and "windowed layers" in reason

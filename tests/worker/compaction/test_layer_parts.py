"""What lies around vLLM's attention layers agrees with what transformers' layers do."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from tests.host.test_attention_probe import config
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.host.attention_probe import probe
from vllm_kvcompress.worker.compaction.layer_parts import LayerParts, check_parts
from vllm_kvcompress.worker.layout.layer_cache import LayerCache

NAME = "model.layers.{}.self_attn"


class Attention(nn.Module):
    """As vLLM's model classes have it."""

    def __init__(self, rotary: nn.Module, sliding_window: int | None = None) -> None:
        super().__init__()
        self.rotary_emb, self.sliding_window = rotary, sliding_window

    def forward(self, positions, q, k):
        return self.rotary_emb(positions, q, k)


class Exaone4Attention(Attention):
    """As vLLM's: made for every layer, called in those with a window. Known by its name."""

    apply_rope_all_layers = False


def parts(layers: list[nn.Module], text: Any) -> LayerParts:
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(nn.Module() for _ in layers)
    for layer, attention in zip(model.model.layers, layers, strict=True):
        layer.self_attn = attention
    given = SimpleNamespace(
        hf_text_config=text, max_model_len=512, using_transformers_backend=lambda: False
    )
    return LayerParts(model, given, torch.device("cpu"))


def rope(text: Any, is_neox: bool) -> nn.Module:
    with set_current_vllm_config(VllmConfig()):
        return get_rope(
            text.head_dim, max_position=512, is_neox_style=is_neox,
            rope_parameters=text.rope_parameters,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "is_neox", "fields"),
    [
        ("llama", True, {}),
        ("glm4", False, {"partial_rotary_factor": 0.5}),
        ("glm4_moe", True, {"partial_rotary_factor": 0.25, "n_routed_experts": 2}),
        ("minimax_m2", True, {"partial_rotary_factor": 0.5, "num_local_experts": 2}),
    ],
)
def test_vllms_modules_and_transformers_turn_alike(name: str, is_neox: bool, fields: dict) -> None:
    text = config(name, head_dim=32, **fields)
    found = parts([Attention(rope(text, is_neox))] * 4, text).rotary(NAME.format(0) + ".attn")
    expected = probe(text)[0].rotary
    assert found is not None and expected is not None
    assert found.is_neox == expected.is_neox is is_neox
    torch.testing.assert_close(found.inv_freq, expected.inv_freq)


def test_layers_that_make_an_embedding_and_do_not_call_it() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    text = config("exaone4", head_dim=32, layer_types=kinds, sliding_window=64)
    windows = [64 if kind == "sliding_attention" else None for kind in kinds]
    found = parts([Exaone4Attention(rope(text, True), window) for window in windows], text)
    rotary = [found.rotary(NAME.format(number) + ".attn") for number in range(4)]
    assert [each is not None and bool(each.inv_freq.any()) for each in rotary] == [True, False] * 2


def layer(**fields: Any) -> LayerCache:
    nothing: Any = None
    return LayerCache(NAME.format(0), 0, 0, 1.0, nothing, nothing, **fields)


def test_what_was_promised_must_be_there() -> None:
    """Requests are admitted by the configuration alone."""
    text = config("llama", head_dim=32)
    given = SimpleNamespace(hf_text_config=text, max_model_len=512)
    setting = parse_config("snapkv")
    assert setting is not None
    rotary = probe(text)[0].rotary
    assert rotary is not None
    whole = layer(rotary=rotary, output_projection=lambda: torch.ones(1))
    check_parts([whole], setting, given)
    still = replace(rotary, inv_freq=torch.zeros(16))
    for broken in (
        replace(whole, rotary=None),
        replace(whole, rotary=still),
        replace(whole, output_projection=None),
    ):
        with pytest.raises(UnsupportedModelError, match=r"around layer model\.layers\.0"):
            check_parts([whole, broken], setting, given)
    text.rope_parameters = {**text.rope_parameters, "rope_type": "yarn"}
    check_parts([replace(whole, rotary=None)], setting, given)

"""Conditions that a call of the rotary embedding stands under."""

import pytest
from torch import nn

from vllm_kvcompress.worker.compaction.rotary_calls import calls_rotary


class Attention(nn.Module):
    def __init__(self, **fields: object) -> None:
        super().__init__()
        for name, value in fields.items():
            setattr(self, name, value)


class Always(Attention):
    def forward(self, positions, q, k):
        return self.rotary_emb(positions, q, k)


class Elsewhere(Attention):
    def forward(self, positions, q, k):
        return self.turn(positions, q, k)


class Windowed(Attention):
    def forward(self, positions, q, k):
        if self.sliding_window or self.all_layers:
            q, k = self.rotary_emb(positions, q, k)
        return q, k


class Either(Attention):
    def forward(self, positions, q, k):
        if self.fused is not None:
            return self.fused(q, k)
        else:
            return self.rotary_emb(positions, q, k)


class ByArgument(Attention):
    def forward(self, positions, q, k):
        if positions is not None:
            q, k = self.rotary_emb(positions, q, k)
        return q, k


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Always(), True),
        (Elsewhere(), True),
        (Windowed(sliding_window=None, all_layers=False), False),
        (Windowed(sliding_window=128, all_layers=False), True),
        (Windowed(sliding_window=None, all_layers=True), True),
        (Windowed(), False),  # an attribute that is not there yet
        (Either(fused=None), True),
        (Either(fused=print), False),
        (ByArgument(), False),
    ],
)
def test_calls(layer: nn.Module, expected: bool) -> None:
    assert calls_rotary(layer, "rotary_emb") is expected


@pytest.mark.parametrize(
    ("module", "name", "fields", "expected"),
    [
        ("llama", "LlamaAttention", {}, True),
        ("qwen3", "Qwen3Attention", {}, True),
        ("glm4", "Glm4Attention", {}, True),
        (
            "exaone4",
            "Exaone4Attention",
            {"sliding_window": 0, "apply_rope_all_layers": False},
            False,
        ),
        (
            "exaone4",
            "Exaone4Attention",
            {"sliding_window": 8, "apply_rope_all_layers": False},
            True,
        ),
    ],
)
def test_classes_of_vllm(module: str, name: str, fields: dict, expected: bool) -> None:
    import importlib

    cls = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    layer = object.__new__(cls)
    nn.Module.__init__(layer)
    for field, value in fields.items():
        setattr(layer, field, value)
    assert calls_rotary(layer, "rotary_emb") is expected

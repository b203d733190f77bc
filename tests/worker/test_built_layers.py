"""Layers are looked at before weights are loaded: vLLM's own loader, without a model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.model_loader import base_loader

from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.worker.built_layers import looked_at_once_built


class Loader(base_loader.BaseModelLoader):
    """Notes when weights are loaded."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__(SimpleNamespace(device="cpu"))  # type: ignore[arg-type]
        self.seen = seen

    def download_model(self, model_config: Any) -> None:
        raise NotImplementedError

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        self.seen.append("weights")
        raise KeyboardInterrupt  # what follows is vLLM's own business


@pytest.fixture()
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    seen: list[str] = []

    def build(**kwargs: Any) -> nn.Module:
        seen.append("layers")
        return nn.Module()

    monkeypatch.setattr(base_loader, "initialize_model", build)
    monkeypatch.setattr(base_loader, "log_online_quantization", lambda config: None)
    monkeypatch.setattr(base_loader, "log_model_inspection", lambda model: None)
    config: Any = SimpleNamespace(
        device_config=SimpleNamespace(device="cpu"), load_config=SimpleNamespace(device=None)
    )

    def run() -> list[str]:
        seen.clear()
        with pytest.raises((KeyboardInterrupt, UnsupportedModelError)):
            Loader(seen).load_model(config, SimpleNamespace(dtype=torch.float32))  # type: ignore[arg-type]
        return seen

    return run


def test_layers_are_seen_before_weights_and_only_inside(load: Any) -> None:
    seen: list[str] = []
    with looked_at_once_built(lambda: seen.append("looked")):
        assert load() == ["layers", "weights"]
        assert load() == ["layers", "weights"], "a draft model, say"
    assert seen == ["looked"]
    assert load() == ["layers", "weights"] and seen == ["looked"]


def test_a_refusal_comes_before_weights(load: Any) -> None:
    def refuse() -> None:
        raise UnsupportedModelError("no")

    with looked_at_once_built(refuse):
        assert load() == ["layers"]
    assert load() == ["layers", "weights"], "everything is as it was"

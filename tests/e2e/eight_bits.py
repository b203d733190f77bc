"""A replay over a cache of 8 bits: transformers attend to what vLLM's cache on a CPU gives back."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.replay import Prefilled, Replay

MOST, SMALLEST, STEP = 448.0, 2.0**-6, 2.0**-9
"""Of e4m3: the largest number, the smallest with a whole mantissa, and the steps below that."""

SCALES = {"_k_scale_float": 2.0**-5, "_v_scale_float": 2.0**-6}

needs_eight_bits = pytest.mark.skipif(
    torch.cuda.is_available() or not torch.cpu._is_avx512_supported(),
    reason="the bytes of vLLM's attention on CPU, which reads 8 bits with AVX-512",
)


def give_scales(engine: Engine, scales: Mapping[str, float] = SCALES) -> None:
    """To all attention layers, as what loads a checkpoint's does."""
    for layer in engine.runner.compilation_config.static_forward_context.values():
        vars(layer).update(scales)


class EightBitReplay(Replay):
    """A model whose keys and values are held in e4m3.

    Parameters
    ----------
    model : str
        Folder of the model.
    scales : tuple[float, float]
        Of keys and of values in all layers, powers of two: what is held twice stays as it is.
    """

    def __init__(self, model: str, scales: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__(model)
        self.scales = scales

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        key, value = (as_held(*each) for each in zip((key, value), self.scales, strict=True))
        return super()._attend(module, query, key, value, attention_mask, **kwargs)

    def prefill(self, token_ids: Sequence[int]) -> Prefilled:
        """Compactions read the cache, too."""
        prompt = super().prefill(token_ids)
        prompt.keys = [as_held(each, self.scales[0]) for each in prompt.keys]
        prompt.values = [as_held(each, self.scales[1]) for each in prompt.values]
        return prompt


def as_held(numbers: torch.Tensor, scale: float) -> torch.Tensor:
    """Numbers of float32 as the cache gives them back: vLLM's kernel on CPU cuts bits off."""
    size = (numbers / scale).abs().clamp(max=MOST).contiguous()
    cut = (size.view(torch.int32) & ~((1 << 20) - 1)).view(torch.float32)
    return torch.where(size < SMALLEST, (size / STEP).floor() * STEP, cut) * scale * numbers.sign()

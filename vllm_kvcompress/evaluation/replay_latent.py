"""A replay of models with latent attention (MLA).

Transformers cache a token's latent [1, L] and the rotated part of its key [1, P] and make keys and
values of heads anew in every step, so what a compaction keeps of the shared row is kept for all
heads. Scores come from products of absorbed queries and rows, as in the engine; here they are
absorbed with the weights as they are stored, and for a whole prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_kvcompress.evaluation.replay import Prefilled, Replay
from vllm_kvcompress.evaluation.replay_rows import KeptRows
from vllm_kvcompress.worker.layout.base import CacheLayout
from vllm_kvcompress.worker.layout.layer_cache import LayerCache


class LatentReplay(Replay):
    """A DeepSeek-like model on transformers. Parameters as for `Replay`.

    In its `Prefilled`, per layer, keys are rows [1, n, L + P], values [1, n, L] are their first
    part, and queries [H, n, L + P] are absorbed.
    """

    @torch.inference_mode()
    def forward(
        self,
        token_ids: list[int],
        kept: Sequence[KeptRows] = (),
        start: int = 0,
        states: dict[int, Any] | None = None,
        logits_to_keep: int = 1,
    ) -> Prefilled:
        """Run tokens over what is kept of those before them."""
        prompt = super().forward(token_ids, kept, start, states, logits_to_keep)
        pairs = zip(prompt.keys, prompt.values, strict=True)
        rows = [torch.cat([latent, rotated], dim=-1) for latent, rotated in pairs]
        prompt.values = prompt.keys
        prompt.keys = rows
        prompt.queries = [
            _absorbed(layer.self_attn, queries)
            for layer, queries in zip(self.layers, prompt.queries, strict=True)
        ]
        return prompt

    def _as_cached(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = values.shape[-1]
        return keys[..., :width], keys[..., width:]

    def layer_cache(self, place: int, layout: CacheLayout) -> LayerCache:
        attention = self.layers[place].self_attn
        width = attention.kv_lora_rank + attention.qk_rope_head_dim
        shape, dtype = (0, 1, self.block_size, width), self.model.dtype
        no_blocks = torch.empty(shape, dtype=dtype, device=self.device)
        return LayerCache(
            name=str(place),
            index=place,
            group=place,
            scale=attention.scaling,
            layout=layout,
            cache=lambda: no_blocks,
        )


def _absorbed(attention: Any, queries: torch.Tensor) -> torch.Tensor:
    """[H, n, nope + P] -> [H, n, L + P]: a head's keys are its rows of the projection times c."""
    heads, nope = attention.num_heads, attention.qk_nope_head_dim
    weight = attention.kv_b_proj.weight.view(heads, nope + attention.v_head_dim, -1)
    plain, rotated = queries.split([nope, attention.qk_rope_head_dim], dim=-1)
    return torch.cat([torch.einsum("hnp,hpl->hnl", plain, weight[:, :nope]), rotated], dim=-1)

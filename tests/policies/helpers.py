"""One hand-made request for policy tests, and what several of them compute by hand."""

from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vllm_kvcompress.kernels.cache.rows import DenseRows
from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.kernels.torch_backend import select_tokens
from vllm_kvcompress.policies.inputs import ScoreInputs


def make_inputs(
    num_tokens: int = 150, window: int = 16, seed: int = 0, **changes: Any
) -> ScoreInputs:
    """Random tensors of one layer: 2 KV heads, 8 query heads, head_dim 32, hidden size 64.

    Sinks and window are forced. `changes` replaces fields of the result.
    """
    generator = torch.Generator().manual_seed(seed)
    forced = torch.zeros(num_tokens, dtype=torch.bool)
    forced[:4] = forced[num_tokens - window :] = True
    rows = DenseRows(
        keys=torch.randn(2, num_tokens, 32, generator=generator),
        values=torch.randn(2, num_tokens, 32, generator=generator),
        queries=torch.randn(8, window, 32, generator=generator),
        scale=32**-0.5,
    )
    fields: dict[str, Any] = {
        "rows": rows,
        "accumulated": None,
        "position": num_tokens,
        "num_keep": 64,
        "forced": forced,
        "num_sink_tokens": 4,
        "layer_index": 1,
        "seed": 99,
        "output_projection": torch.randn(8, 64, 32, generator=generator),
        "rotary": Rotary(inv_freq=10000.0 ** (-torch.arange(16) / 16), is_neox=True),
    }
    return changed(ScoreInputs(**fields), **changes)


def changed(given: ScoreInputs, **changes: Any) -> ScoreInputs:
    """The same request with other fields, those of its rows among them."""
    names = {each.name for each in fields_of(DenseRows)}
    own = {name: value for name, value in changes.items() if name in names}
    rest = {name: value for name, value in changes.items() if name not in names}
    return replace(given, rows=replace(given.rows, **own), **rest)  # type: ignore[type-var]


def select(scores: torch.Tensor, forced: torch.Tensor, num_keep: int) -> torch.Tensor:
    """[KV, num_keep] ascending positions of the best of [KV, n] scores, forced ones among them."""
    count, keep = torch.tensor([scores.shape[1]]), torch.tensor([num_keep])
    return select_tokens(scores[None, None], forced[None], count, keep, num_keep)[0, 0]


def attention_by_loops(given: ScoreInputs) -> np.ndarray:
    """[num_heads, window, n] float64: causal attention of the window's queries, row by row."""
    assert given.queries is not None
    queries, keys = given.queries.double().numpy(), given.keys.double().numpy()
    num_heads, window, _ = queries.shape
    num_kv_heads, num_tokens, _ = keys.shape
    weights = np.zeros((num_heads, window, num_tokens))
    for head in range(num_heads):
        for i in range(window):
            visible = num_tokens - window + i + 1
            logits = keys[head * num_kv_heads // num_heads, :visible] @ queries[head, i]
            exponents = np.exp((logits - logits.max()) * given.scale)
            weights[head, i, :visible] = exponents / exponents.sum()
    return weights


def best_first(scores: np.ndarray) -> list[int]:
    """Positions from the best score to the worst, equal ones in order."""
    return sorted(range(len(scores)), key=lambda position: -scores[position])

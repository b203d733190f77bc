"""Which models with latent attention are served, and the words for those that are not."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_kvcompress.lengths.latent import SERVED, latent_width, unserved_latent


@pytest.mark.parametrize("kind", SERVED)
def test_dense_families_are_served(kind: str) -> None:
    text = SimpleNamespace(model_type=kind, kv_lora_rank=512, qk_rope_head_dim=64)
    assert unserved_latent(text) is None
    text.index_topk = text.compress_ratios = None
    assert unserved_latent(text) is None
    assert latent_width(text) == 576


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"index_topk": 2048}, "has sparse latent attention (MLA with an indexer), whose indexer"),
        ({"compress_ratios": [0, 4]}, "has sparse latent attention (MLA with an indexer)"),
        ({"model_type": "other"}, "has latent attention (MLA) of the kind other, which has not"),
        ({"model_type": None}, "has latent attention (MLA) of the kind None"),
    ],
    ids=str,
)
def test_what_is_not_served_is_told_why(fields: dict[str, Any], words: str) -> None:
    found = unserved_latent(SimpleNamespace(**{"model_type": "deepseek_v3", **fields}))
    assert found is not None and found.startswith(words)


def test_served_families_are_named_where_the_kind_is_not_said() -> None:
    found = unserved_latent(SimpleNamespace())
    assert found is not None and "deepseek_v2, deepseek_v3, " in found

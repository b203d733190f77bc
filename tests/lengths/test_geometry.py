"""Models whose layers have heads of several sizes: those that attend to everything count."""

import json
from pathlib import Path

import pytest
from transformers import Gemma4TextConfig

from lab.random_configs import CONFIGS
from vllm_kvcompress.lengths.geometry import ModelGeometry, read_geometry


@pytest.mark.parametrize("form", ["published", "layer by layer"])
@pytest.mark.parametrize("shares_keys", [True, False])
def test_full_layers_of_gemma_4(tmp_path: Path, form: str, shares_keys: bool) -> None:
    """Their heads are larger; only where keys are the values, they have a number of their own."""
    fields = {**CONFIGS["gemma4"], "attention_k_eq_v": shares_keys}
    if form == "layer by layer":
        fields = Gemma4TextConfig(**fields).to_dict()
        assert "per_layer_config" in fields
    (tmp_path / "config.json").write_text(json.dumps(fields, default=str))
    heads = 1 if shares_keys else 2
    expected = ModelGeometry(2, heads, 64, "bfloat16", 4096, num_windowed=2, window=96)
    assert read_geometry(tmp_path) == expected

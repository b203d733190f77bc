"""Rotary embeddings that lie beside a layer and are not used."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vllm_kvcompress.worker.compaction.layer_parts import TURNED_IF, softmax_terms

CONDITIONS = {
    "AfmoeAttention": "self.is_local_attention and self.rotary_emb is not None",
    "CohereAttention": "self.v1 or self.sliding_window",
    "Cohere2MoeAttention": "self.sliding_window or self.force_rope",
    "Exaone4Attention": "self.sliding_window or self.apply_rope_all_layers",
    "ExaoneMoeAttention": "self.use_rope",
    "FalconAttention": "self.use_rotary",
    "GraniteAttention": "self.use_rope",
    "GraniteMoeAttention": "self.use_rope",
    "OlmoHybridAttention": "self._use_rope",
    "Step3p5Attention": "self.use_rope",
}
"""What vLLM's classes ask before they turn queries and keys."""

OTHERS = {
    "Gemma3nAttention": "self.is_kv_shared_layer",  # refused: `check_layer`
    "Gemma4Attention": "self.is_kv_shared_layer",
    "LoopCoderAttention": "loop_idx == 0",  # turned either way
    "Zamba2Attention": "self.config.use_mem_rope",  # made only where it is used
}


def test_all_of_vllms_conditions_are_known() -> None:
    """A new class that leaves its embedding unused must come into the table."""
    models = pytest.importorskip("vllm.model_executor.models")
    found = {}
    for path in sorted(Path(models.__file__).parent.glob("*.py")):
        for owner in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(owner, ast.ClassDef):
                continue
            for node in ast.walk(owner):
                if isinstance(node, ast.If) and any(map(turns, node.body)):
                    found[owner.name] = ast.unparse(node.test)
    # Without an embedding there is nothing beside the layer to be found.
    used = {name: test for name, test in found.items() if test != "self.rotary_emb is not None"}
    assert used == CONDITIONS | OTHERS
    assert TURNED_IF.keys() == CONDITIONS.keys()


def turns(statement: ast.stmt) -> bool:
    """Whether it calls ``self.rotary_emb``."""
    return any(
        isinstance(node, ast.Call) and ast.unparse(node.func) == "self.rotary_emb"
        for node in ast.walk(statement)
    )


def test_each_condition_is_what_vllm_asks() -> None:
    """Both answers of every name that a condition has."""
    for name, turned in TURNED_IF.items():
        words = {w.removeprefix("self.") for w in CONDITIONS[name].split() if "self." in w}
        names = sorted(words - {"rotary_emb"})
        for values in range(2 ** len(names)):
            fields = {each: bool(values >> bit & 1) for bit, each in enumerate(names)}
            if "sliding_window" in fields:
                fields["sliding_window"] = 128 if fields["sliding_window"] else None  # type: ignore[assignment]
            layer = SimpleNamespace(**fields, rotary_emb=nn.Identity())
            assert bool(turned(layer)) == bool(eval(CONDITIONS[name], {"self": layer})), name


def test_terms_of_an_implementation() -> None:
    plain = softmax_terms(SimpleNamespace(logits_soft_cap=None, sinks=None))
    assert plain.soft_cap == 0.0 and plain.sinks is None
    sinks = torch.ones(2)
    capped = softmax_terms(SimpleNamespace(logits_soft_cap=30, sinks=sinks))
    assert capped.soft_cap == 30.0 and capped.sinks is sinks
